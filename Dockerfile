# Everything that a run needs, for CPUs or NVIDIA GPUs:
#
#   docker build -t peft-pretraining .
#   docker build -t peft-pretraining:cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -v "$PWD:/work" peft-pretraining peft-pretrain --help
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" peft-pretraining:cuda \
#       peft-torchrun --standalone --nproc_per_node 8 -m torchrun_main --model_config llama_60m ...
#
# BASE is any image of Debian or Ubuntu; with CUDA, one whose driver the machine has. Runs write below /work.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# torch's wheels for CPUs have no CUDA in them, and are a tenth as large.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Of pyproject.toml: fused and flash-attn need CUDA.
ARG EXTRAS=zstd

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

# Python, where the base has none, and a compiler: torch.compile makes kernels while a run starts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && if ! command -v python3 >/dev/null; then apt-get install -y --no-install-recommends python3; fi \
    && if ! python3 -c 'import ensurepip, sysconfig, os; assert os.path.exists(sysconfig.get_path("include"))'; then \
        apt-get install -y --no-install-recommends python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV"

WORKDIR /src
# The versions that the tests ran on, in a layer of their own: they change less often than the code.
COPY requirements.txt ./
RUN grep '^torch==' requirements.txt > torch.txt \
    && pip install --index-url "$TORCH_INDEX" -r torch.txt \
    && pip install -r requirements.txt
COPY pyproject.toml README.md LICENSE NOTICE torchrun_main.py pretokenize.py run_glue.py run_tasks.py ./
COPY configs configs
COPY peft_pretraining peft_pretraining
RUN pip install ".[$EXTRAS]" && rm -rf build ./*.egg-info

# Not as root; a folder of the host is written with `docker run --user "$(id -u):$(id -g)"`.
RUN mkdir -p /work && chmod 1777 /work
ENV HOME=/work HF_HOME=/work/.cache/huggingface
USER 1000
WORKDIR /work
CMD ["peft-pretrain", "--help"]
