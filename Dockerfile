# syntax=docker/dockerfile:1
# The service as an image: `--target cpu` or `--target gpu` (amd64). Run it with a config at
# /etc/coe/config.yaml, a volume at /models and a writable /tmp; nothing else is written.

# debian:bookworm-slim of August 2026, its index of all platforms.
ARG BASE=docker.io/library/debian:bookworm-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

# --- building: what that needs stays here

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/coe
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
WORKDIR /src

# What is locked is a layer of its own, below our code: a change of code moves some MB, not all.
FROM build AS locked-cpu
COPY deploy/torch.sh deploy/
COPY deploy/locks deploy/locks/
RUN --mount=type=cache,target=/var/cache/pip,sharing=locked \
    deploy/torch.sh /opt/coe && \
    /opt/coe/bin/pip install --quiet --no-deps --require-hashes -r deploy/locks/image-cpu.txt && \
    /opt/coe/bin/pip uninstall --quiet -y uv

FROM locked-cpu AS build-cpu
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY router_models router_models
# --root: only what is ours, under /own/opt/coe.
RUN /opt/coe/bin/pip install --quiet --no-deps --no-build-isolation --root /own . && \
    ln -s lib/python3.11/site-packages/router_models /own/opt/coe/router_models && \
    /opt/coe/bin/python -m service.launch.haproxy_config /own/opt/coe/haproxy
COPY Dockerfile NOTICE ./
COPY deploy/locked_packages.py deploy/sbom.py deploy/
RUN /opt/coe/bin/python -m deploy.sbom -o /own/opt/coe/sbom.cdx.json && \
    cp LICENSE NOTICE /own/opt/coe/

FROM build AS locked-gpu
COPY deploy/locks deploy/locks/
RUN --mount=type=cache,target=/var/cache/pip,sharing=locked \
    /opt/coe/bin/pip install --quiet --no-deps --require-hashes -r deploy/locks/image-gpu.txt

FROM locked-gpu AS build-gpu
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY router_models router_models
RUN /opt/coe/bin/pip install --quiet --no-deps --no-build-isolation --root /own . && \
    ln -s lib/python3.11/site-packages/router_models /own/opt/coe/router_models && \
    /opt/coe/bin/python -m service.launch.haproxy_config /own/opt/coe/haproxy
COPY Dockerfile ./
COPY deploy/locked_packages.py deploy/licence_notice.py deploy/sbom.py deploy/
RUN /opt/coe/bin/python -m deploy.sbom --gpu -o /own/opt/coe/sbom.cdx.json && \
    /opt/coe/bin/python -m deploy.licence_notice --gpu /own/opt/coe/NOTICE && \
    cp LICENSE /own/opt/coe/

# --- running

FROM ${BASE} AS run
# util-linux: setpriv, so that HAProxy ends with what started it. procps and bash: KubeRay's.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update && apt-get install -y --no-install-recommends bash ca-certificates libnuma1 procps python3 tini util-linux && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 coe && useradd --uid 10001 --gid coe --no-create-home --home-dir /tmp --shell /usr/sbin/nologin coe && \
    install -d -o coe -g coe /models && install -d /etc/coe
# /tmp is the one place to write beside /models: what keeps a cache in its home keeps it there. (A
# pool on GPUs keeps compiled kernels in /models/.compiled.) pip fetches the catalogue's models (it
# compiles nothing here), and keeps them once.
ENV PATH=/opt/coe/bin:$PATH \
    HOME=/tmp \
    COE_MODELS=/models \
    HF_HOME=/tmp/huggingface \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="coe" \
      org.opencontainers.image.description="One OpenAI-compatible endpoint for many expert models on few accelerators" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# Not /tmp, where everybody may write: nothing is taken from the working directory by chance.
WORKDIR /
EXPOSE 8000
VOLUME ["/models"]
# A first start may download and load for long; after that it must answer.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=6 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "--", "coe"]
CMD ["serve", "--config", "/etc/coe/config.yaml", "--host", "0.0.0.0"]

FROM run AS gpu
# Compilers and Python's headers: Triton compiles its bridge to CUDA's driver in C when it first runs,
# and Inductor what a graph computes on the CPU in C++.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    apt-get update && apt-get install -y --no-install-recommends g++ gcc libc6-dev libpython3-dev && \
    rm -rf /var/lib/apt/lists/*
# FlashInfer's sampler would be compiled at the first start, by CUDA's compiler, with a C++ one: vLLM
# has another, of Triton's.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_USE_FLASHINFER_SAMPLER=0
# Of all that is in it: /opt/coe/NOTICE says what is whose.
LABEL org.opencontainers.image.licenses="Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND 0BSD AND BSD-2-Clause AND BSD-3-Clause AND BSL-1.0 AND CC0-1.0 AND CNRI-Python AND GPL-2.0-only AND ISC AND LGPL-2.1-only AND LicenseRef-Debian AND LicenseRef-NVIDIA AND LicenseRef-Repoze AND MIT AND MIT-0 AND MIT-CMU AND MPL-2.0 AND PSF-2.0 AND Unlicense"
COPY --from=locked-gpu /opt/coe /opt/coe
COPY --from=build-gpu /own/opt/coe /opt/coe
USER 10001:10001

FROM run AS cpu
# Of all that is in it: /opt/coe/NOTICE says what is whose.
LABEL org.opencontainers.image.licenses="Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND 0BSD AND BSD-2-Clause AND BSD-3-Clause AND BSL-1.0 AND CC0-1.0 AND CNRI-Python AND GPL-2.0-only AND ISC AND LGPL-2.1-only AND LicenseRef-Debian AND LicenseRef-Intel-EULA AND LicenseRef-Repoze AND MIT AND MIT-0 AND MIT-CMU AND MPL-2.0 AND PSF-2.0 AND Unlicense"
COPY --from=locked-cpu /opt/coe /opt/coe
COPY --from=build-cpu /own/opt/coe /opt/coe
USER 10001:10001
