"""Dynamic Gradient Alignment inside a plain PyTorch loop: which of three data sources helps the target?"""

import torch

from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy

torch.manual_seed(0)
truth = {"useful": torch.tensor([1.0, -2.0, 0.5]), "noise": torch.zeros(3), "harmful": torch.tensor([-1.0, 2.0, -0.5])}
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)


def loss_on(domain: str) -> torch.Tensor:
    x = torch.randn(16, 3)
    return torch.nn.functional.mse_loss(model(x)[:, 0], x @ truth[domain] + 0.1 * torch.randn(16))


policy = build_policy({"policy": "dga", "eta": 5.0, "ema": 0.1, "update_every_steps": 5})
state = policy.init(MixtureSetting(domains=tuple(truth), tokens_D=torch.ones(3, dtype=torch.float64)))
for step in range(1, 301):
    optimizer.zero_grad()
    loss_on(list(truth)[int(torch.multinomial(policy.weights(state), 1))]).backward()
    optimizer.step()
    if step % policy.config.update_every_steps == 0:  # the target looks like the useful domain; its batch is fresh
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss_on(d), model.parameters())]) for d in truth]
        v = torch.cat([g.flatten() for g in torch.autograd.grad(loss_on("useful"), model.parameters())])
        dots, norms = torch.stack([g @ v for g in grads]).double(), torch.stack([g.norm() for g in grads]).double()
        alignment = Alignment(dots, torch.full((3,), 16), float(v.norm()), norms)
        state = policy.update(state, Report(step=step, tokens_D=torch.ones(3).double(), alignment=alignment))
print({name: round(weight, 3) for name, weight in zip(truth, policy.weights(state).tolist(), strict=True)})
