# Triaxis with its CUDA kernels, on PyTorch's public image (amd64; a driver for CUDA 13).
#
#   docker build --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" -t triaxis .
#   docker run --rm --gpus all triaxis                     # `triaxis env`: what was built and what each operator uses
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#       triaxis train llama2-7b --gpus 8
ARG PYTORCH=2.13.0-cuda13.0-cudnn9

FROM pytorch/pytorch:${PYTORCH}-devel AS build
ARG COMMIT=unknown
WORKDIR /source
COPY . .
# Kernels take a compiler, not a GPU. A build without them is an error.
RUN echo "$COMMIT" > engine/COMMIT \
    && TRIAXIS_CUDA=on python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM pytorch/pytorch:${PYTORCH}-runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PIP_BREAK_SYSTEM_PACKAGES: pip may install into the image's Python if that is its system's.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1 HOME=/home/triaxis
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir "$(echo /wheels/*.whl)[hf]" \
    && triaxis --version | grep "CUDA kernels for"
# HOME is for whatever user the container runs as: it keeps what was measured at the start of runs.
RUN useradd --create-home --home-dir /home/triaxis --uid 10001 triaxis \
    && chmod 1777 /home/triaxis \
    && install --directory --owner triaxis /work
USER 10001
WORKDIR /work
ENTRYPOINT ["triaxis"]
CMD ["env"]
