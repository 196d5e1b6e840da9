"""A custom model, from no library: adapters on two layers, and a head that is trained in full."""

import torch
from torch import nn

from lora_fx.peft import LoraConfig, PeftModel, get_peft_model

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
x, y = torch.rand(256, 20), torch.randint(2, (256,))
outputs = model(x).detach()

config = LoraConfig(r=8, target_modules=["0", "2"], modules_to_save=["4"])
peft_model = get_peft_model(model, config)
peft_model.print_trainable_parameters()

optimizer = torch.optim.Adam(peft_model.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    loss = nn.functional.cross_entropy(peft_model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"first loss {losses[0]:.5f}, lower afterwards: {losses[-1] < losses[0]}")

with peft_model.disable_adapter():
    print("the base is as it was:", torch.allclose(peft_model(x), outputs))

peft_model.save_pretrained("mlp")
trained = peft_model.eval()(x)
merged = peft_model.merge_and_unload()
print("merged:", type(merged).__name__, torch.allclose(merged(x), trained, atol=1e-5))

torch.manual_seed(0)
again = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
loaded = PeftModel.from_pretrained(again, "mlp")
print("loaded:", torch.allclose(loaded(x), trained, atol=1e-5))
