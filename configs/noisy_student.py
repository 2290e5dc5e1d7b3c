"""The noisy student of the paper, rounds 0 to 5 (sections 4.2 and 4.4, table 2).

    maknet noisy-student --config noisy_student --workdir runs/ns \\
        --config.labelled=shards/deeplesion --config.unlabelled=shards/tcia

Round 0 is the teacher. In each further round the latest network labels the unlabelled images, with
noise off, and a student learns from both, with noise on. The results are compared with table 2.
"""

from ml_collections import ConfigDict


def get_config():
    """`teacher_changes` and `student_changes` override fields of the two training configs."""
    return ConfigDict(
        {
            "seed": 0,
            "rounds": 5,  # students
            "labelled": "shards/deeplesion",  # folder written by `maknet prepare`
            "unlabelled": "shards/tcia",  # folder written by `maknet prepare`
            "split": "unlabelled",  # of the unlabelled images
            "teacher": "teacher",  # config of round 0
            "student": "student",  # config of the other rounds
            "teacher_changes": (),  # such as ("optimizer.learning_rate=0.003",)
            "student_changes": (),
            "from_last": False,  # True: a student starts from its teacher's weights
            "checkpoint": "best",  # of the teacher that labels: best or last
            "top": 15,  # largest number of labels per image
            "threshold": 0.5,  # a label is kept if its confidence exceeds this
            "precision": 0.0,  # above 0: thresholds per label with this precision in validation
            "evaluate": (),  # splits to score after each round; () is test and hand
            "soft": False,  # True: students learn the confidences of the labels that are kept
        }
    )
