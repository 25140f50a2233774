# messcli on a machine with an NVIDIA card and the NVIDIA container toolkit:
#   docker build -t messcli .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" messcli route requests.jsonl -o answers.jsonl
# EXTRAS are those of pyproject.toml: docker build --build-arg EXTRAS=lora,vllm,parquet -t messcli .
# The base has no CUDA of its own but what the driver needs: torch brings the libraries.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04

FROM ${BASE} AS build
# Ubuntu keeps no old versions: a pinned one can't be installed a month later
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
ARG EXTRAS=lora,parquet
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY man man
COPY messcli messcli
RUN python3 -m venv /opt/messcli \
 && /opt/messcli/bin/pip install --no-cache-dir ".[${EXTRAS}]" \
 && /opt/messcli/bin/messcli --version

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 messcli \
 && install -d -m 1777 /work /models
COPY --from=build /opt/messcli /opt/messcli
# HF_HOME: mount a folder at /models to keep what is downloaded. HOME: any user may run it
ENV PATH=/opt/messcli/bin:$PATH \
    HF_HOME=/models \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["messcli"]
CMD ["--help"]
