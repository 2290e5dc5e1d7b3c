"""The paper's noisy student, rounds 0 to 5 (sections 4.2 and 4.4, table 2).

    maknet noisy-student --config noisy_student --workdir runs/ns \\
        --config.labelled=shards/deeplesion --config.unlabelled=shards/tcia

Round 0 is the teacher. In each further round the last network labels the unlabelled images, noise
off, and a student learns from both, noise on. Table 2 of the paper stands beside what is reached.
"""

from ml_collections import ConfigDict


def get_config():
    """Fields of the two pages are changed by `teacher_changes` and `student_changes`."""
    return ConfigDict(
        {
            "seed": 0,
            "rounds": 5,  # students
            "labelled": "shards/deeplesion",
            "unlabelled": "shards/tcia",
            "split": "unlabelled",  # of it
            "teacher": "teacher",  # page of round 0
            "student": "student",  # page of the other rounds
            "teacher_changes": (),  # as ("optimizer.learning_rate=0.003",)
            "student_changes": (),
            "from_last": False,  # True: a student starts from its teacher's weights
            "checkpoint": "best",  # of a teacher that labels: best or last
            "top": 15,  # labels an image at most
            "threshold": 0.5,  # that a label's confidence must exceed
            "evaluate": (),  # splits to score after each round; () takes test and hand
            "soft": False,  # True: students learn the confidences of the labels that were kept
        }
    )
