"""A vision transformer with a new head, trained by the Trainer, and merged."""

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from lora_fx.peft import LoraConfig, get_peft_model

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes))
images, labels = torch.randn(12, 3, 16, 16), torch.randint(3, (12,))
data = [
    {"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)
]

config = LoraConfig(
    r=4,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.1,
    bias="lora_only",
    modules_to_save=["classifier"],
)
lora_model = get_peft_model(model, config)
lora_model.print_trainable_parameters()

arguments = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "report_to": [],
}
arguments |= {
    "max_steps": 6,
    "save_strategy": "no",
    "disable_tqdm": True,
    "label_names": ["labels"],
}
arguments |= {"remove_unused_columns": False}
trainer = Trainer(lora_model, TrainingArguments("vit", **arguments), train_dataset=data)
trainer.train()
print("evaluated:", "eval_loss" in trainer.evaluate(data))

lora_model.save_pretrained("vit-lora")
lora_model.eval()
trained = lora_model(images).logits
lora_model.merge_adapter()
print("merged in place:", torch.allclose(lora_model(images).logits, trained, atol=1e-5))
lora_model.unmerge_adapter()
print("and apart again:", torch.allclose(lora_model(images).logits, trained, atol=1e-5))
merged = lora_model.merge_and_unload(safe_merge=True)
print("merged:", type(merged).__name__, torch.allclose(merged(images).logits, trained, atol=1e-5))
