# maknet on CPU. Untested: no image has been built from this file.
#
#     docker build -t maknet .
#     docker run --rm -v "$PWD:/data" maknet predict scans --model head-neck --out labels.csv
FROM python:3.13-slim
COPY . /opt/maknet
RUN pip install --no-cache-dir -c /opt/maknet/constraints.txt "/opt/maknet[sr]" \
    && useradd --create-home maknet
USER maknet
WORKDIR /data
ENTRYPOINT ["maknet"]
