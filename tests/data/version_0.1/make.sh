# What commit 0269bb7 wrote: run this there, then delete run/plots, claims/ and tmp/.
python - <<'PY'
import torch, os
from PIL import Image
from safetensors.torch import save_file
from spar_lightning.datamodules.scenes import render
from tests.any_words import SmallCLIP
os.makedirs("photos")
for i in range(6):
    Image.fromarray(render(1, i, 80, 96).image).save(f"photos/{i}.png")
torch.manual_seed(0)
save_file(SmallCLIP().state_dict(), "clip.safetensors")
PY
cat > mine.yaml <<'Y'
run_dir: run
seed_everything: 0
model:
  backbone: {class_path: tests.any_words.SmallCLIP, init_args: {pretrained: clip.safetensors}}
  stride: 24
  trainable: [blocks.-1]
  lr: 1.0e-3
  templates: ["{}"]
  geometry: aligned
  refine: lposs_spar
data:
  class_path: spar_lightning.datamodules.SA1B
  init_args:
    shards: photos
    cache: cache
    augmentation: {scale: [96, 80], min_side: 64, multiple: 16}
    prefix: true
trainer: {accelerator: cpu, max_epochs: 1, log_every_n_steps: 1, logger: false}
Y
python -c "
import tests.any_words
from spar_lightning.cli import main
raise SystemExit(main(['fit', '--config', 'mine.yaml', '--checkpoint_every_n_steps', '2', '--trainer.max_epochs', '1']))"
