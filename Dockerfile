# The command spar, with torch for CUDA:
#   docker build -t spar .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" -v ~/.cache:/root/.cache spar fit --config quickstart
# --ipc=host: loader processes pass samples through shared memory, of which a container has only 64 MB.
FROM python:3.11-slim
COPY pyproject.toml setup.cfg README.md LICENSE /source/
COPY spar_lightning /source/spar_lightning
RUN pip install --no-cache-dir "/source[onnx,context]"
WORKDIR /work
ENTRYPOINT ["spar"]
CMD ["--help"]
