"""Ideas of other programs and papers about learning, each tried in the default recipe.

    python benchmarks/learning_ideas.py --runs 3
    python benchmarks/learning_ideas.py --only lookahead SOAP --runs 3 --options "--width 0.5"

Runs, table and figure are those of ablations.py; results/learning_ideas.json has every run. Nothing
of this is in the program: see "Ideas of other programs" in benchmarks/README.md. Two more that were
tried here are in it: the balanced rows of Muon, and --drop-easiest.
"""

import ablations
from ablations import BASE, Variant

# ---- Snippets: learning rates --------------------------------------------------------------------

# AdamW gets a second group, of the weights that `is_chosen`, with a learning rate of its own.
OWN_RATE = """
build_optimizers = ic.build_optimizers

def with_own_rate(model, config, dtype, device):
    optimizers = build_optimizers(model, config, dtype, device)
    adamw = optimizers[1]
    names = dict((id(weight), name) for name, weight in model.named_parameters())

    def is_chosen(weight):
        name = names[id(weight)]
        return {condition}

    group = adamw.param_groups[0]
    chosen = [weight for weight in group["params"] if is_chosen(weight)]
    group["params"] = [weight for weight in group["params"] if not is_chosen(weight)]
    adamw.add_param_group(dict(params=chosen, lr=group["lr"] * {factor}))
    return optimizers

replace(ic, "build_optimizers", with_own_rate)
"""
IS_BIAS = 'name.endswith("bias")'
IS_NORM_WEIGHT = '"norm" in name and name.endswith("weight")'
IS_CLASSIFIER = 'name == "classifier.weight"'

POWER = """
def with_power(scheduler, fraction, losses):
    warm_up = 0.1 + 9 * fraction
    decay = (1 - fraction) / 0.9
    return min(warm_up, max(decay, 0) ** {power})

replace(ic, "lr_factor", with_power)
"""

# ---- Snippets: the optimiser ---------------------------------------------------------------------

# Those of https://github.com/hiverge/cifar10-speedrun.
COEFFICIENTS = """
import inspect
source = inspect.getsource(ic.newton_schulz)
assert "3.4445, -4.7750, 2.0315" in source
names = dict(vars(ic))
exec(source.replace("3.4445, -4.7750, 2.0315", "3.4576, -4.7391, 2.0843"), names)
replace(ic, "newton_schulz", names["newton_schulz"])
"""

# Vyas et al., 2024, https://arxiv.org/abs/2409.11321, on the smaller side of each matrix only: Adam
# in the eigenvectors of the gradients' mean Gram matrix. Norms of weights and updates are Muon's.
SOAP = """
BETA1, BETA2 = 0.8, 0.95

def soap_update(state, grad):
    gram = grad @ grad.T
    if not state:
        state.update(gram=gram, m=torch.zeros_like(grad), v=torch.zeros_like(grad), t=0)
    state["gram"] = torch.lerp(state["gram"], gram, 0.05)
    if state["t"] % 10 == 0:
        basis = torch.linalg.eigh(state["gram"]).eigenvectors
        if "basis" in state:
            state["m"] = basis.T @ state["basis"] @ state["m"]
        state["basis"] = basis
    state["t"] += 1
    rotated = state["basis"].T @ grad
    state["m"] = torch.lerp(state["m"], rotated, 1 - BETA1)
    state["v"] = torch.lerp(state["v"], rotated.square(), 1 - BETA2)
    m = state["m"] / (1 - BETA1 ** state["t"])
    v = state["v"] / (1 - BETA2 ** state["t"])
    update = state["basis"] @ (m / (v.sqrt() + 1e-10))
    return update * (len(grad) ** 0.5 / update.norm())

soap_states = dict()

@torch.no_grad()
def step(self, closure=None):
    for group in self.param_groups:
        for weight in group["params"]:
            grad = weight.grad.flatten(1)
            is_tall = grad.shape[0] > grad.shape[1]
            state = soap_states.setdefault(id(weight), dict())
            update = soap_update(state, grad.T if is_tall else grad)
            update = update.T if is_tall else update
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            weight.sub_(update.reshape(weight.shape) * group["lr"])

replace(ic.Muon, "step", step)
"""

# Zhang et al., 2019, https://arxiv.org/abs/1907.08610; airbench94 does this every five steps.
LOOKAHEAD = """
train_step = ic.Trainer.train_step
slow = []

@torch.no_grad()
def pull_back(weights, share):
    for kept, weight in zip(slow, weights):
        kept.lerp_(weight, share)
        weight.copy_(kept)

def train_step_then_pull_back(self, *arguments, **options):
    weights = [weight for weight in self.state.model.parameters() if weight.requires_grad]
    if not slow:
        slow.extend(weight.detach().clone() for weight in weights)
    stats = train_step(self, *arguments, **options)
    progress = self.state.progress
    if progress.step % 5 == 0 or progress.done:
        pull_back(weights, 1.0 if progress.done else 0.7)
    return stats

replace(ic.Trainer, "train_step", train_step_then_pull_back)
"""

# The mean of the weights after each of the last steps becomes the result. `floor` is the smallest
# learning rate in the second half of the run, as a share of the peak.
LAST_WEIGHTS = """
train_step, lr_factor = ic.Trainer.train_step, ic.lr_factor
sums = dict()

def train_step_then_add(self, *arguments, **options):
    stats = train_step(self, *arguments, **options)
    progress, state = self.state.progress, self.state.model.state_dict()
    if progress.total_steps - progress.step >= {steps}:
        return stats
    for name, value in state.items():
        if value.is_floating_point():
            sums[name] = sums.get(name, 0) + value
    if progress.done:
        for name, total in sums.items():
            state[name].copy_(total / {steps})
    return stats

def with_floor(scheduler, fraction, losses):
    factor = lr_factor(scheduler, fraction, losses)
    return max(factor, {floor}) if fraction > 0.5 else factor

replace(ic.Trainer, "train_step", train_step_then_add)
replace(ic, "lr_factor", with_floor)
"""

# ---- Snippets: the network -----------------------------------------------------------------------

# Hu et al., 2017, https://arxiv.org/abs/1709.01507: the mean of each channel decides how much of
# each channel a stage passes on.
SQUEEZE_EXCITATION = """
build_stage, stage_forward = ic.Stage.__init__, ic.Stage.forward

def with_gates(self, in_channels, out_channels):
    build_stage(self, in_channels, out_channels)
    self.squeeze = torch.nn.Linear(out_channels, 16, bias=False)
    self.excite = torch.nn.Linear(16, out_channels, bias=False)
    torch.nn.init.zeros_(self.excite.weight)  # so that all is passed on at first

def gated(self, x):
    x = stage_forward(self, x)
    gates = self.excite(F.silu(self.squeeze(x.mean((2, 3)))))
    return x * (2 * gates.sigmoid())[:, :, None, None]

replace(ic.Stage, "__init__", with_gates)
replace(ic.Stage, "forward", gated)
"""

TWO_STAGES = """
build = ic.CNN.__init__

def with_wider_classifier(
    self, classes=10, channels=3, image_size=32, width=1.0, dropout=0.0
):
    build(self, classes, channels, image_size, width, dropout)
    features = sum(stage.conv1.out_channels for stage in self.stages[1:])
    self.classifier = torch.nn.Linear(features, classes, bias=False)

def forward(self, images):
    x = self.stages[0](F.silu(self.whiten(images)))
    middle = self.stages[1](x)
    last = self.stages[2](middle)
    return self.classifier(torch.cat([middle.mean((2, 3)), last.mean((2, 3))], 1))

replace(ic.CNN, "__init__", with_wider_classifier)
replace(ic.CNN, "forward", forward)
"""

# The first layer whitens patches of 3×3 pixels and halves the size; the first stage keeps it.
HALVED_FIRST = ablations.FIRST_LAYER.format(stride=2, padding=0)
HALVED_FIRST += """
with_two_halvings = ic.instantiate

class FirstStage(ic.Stage):
    def forward(self, x):
        x = F.silu(self.norm1(self.conv1(x)))
        return x + F.silu(self.norm2(self.conv2(x)))

def with_one_halving(*arguments, **options):
    model = with_two_halvings(*arguments, **options)
    model.stages[0].__class__ = FirstStage
    return model

replace(ic, "instantiate", with_one_halving)
"""

# ---- Snippets: images ----------------------------------------------------------------------------

# One brightness and one contrast for the whole batch, as in cifar10-speedrun.
COLOURS = """
gather = ic.gather_augmented
generator = torch.Generator().manual_seed(7)

def with_colours(images, batch):
    x = gather(images, batch)
    brightness, contrast = (torch.rand(2, generator=generator) * 2 - 1).tolist()
    mean = x.float().mean()
    x = (x - mean) * (1 + 0.13 * contrast) + mean
    return x + 0.14 * brightness * x.std()

replace(ic, "gather_augmented", with_colours)
"""

CROPS = """
resize = ic.resize
generator = torch.Generator().manual_seed(9)

def crop_at_first(images, scale):
    is_training = torch.is_grad_enabled()
    if scale > {largest_scale} or not is_training:
        return resize(images, scale)
    size = round(images.shape[-1] * scale)
    positions = images.shape[-1] - size + 1
    top, left = torch.randint(positions, (2,), generator=generator).tolist()
    return images[:, :, top : top + size, left : left + size]

replace(ic, "resize", crop_at_first)
"""

HALF_BATCHES = """
compute_step = ic.Trainer.compute_step

def in_two_steps(self, batch, scale):
    if scale > {largest_scale}:
        return compute_step(self, batch, scale)
    half = len(batch.order) // 2
    halves = (batch.take(slice(half)), batch.take(slice(half, None)))
    return torch.cat([compute_step(self, each, scale) for each in halves], dim=1)

replace(ic.Trainer, "compute_step", in_two_steps)
"""

# As in airbench96 of https://github.com/KellerJordan/cifar10-airbench: a narrow network is trained
# for three epochs, and the images that it finds easiest are left out.
PROXY = """
import dataclasses
train_epochs = ic.train_epochs

def order_by_loss(trainer):
    options = dict(width=0.5, epochs=3, progressive_resizing=0.9)
    config = dataclasses.replace(trainer.config, **options)
    proxy = ic.Trainer(config, trainer.data, trainer.device)
    for epoch in range(config.epochs):
        plan = proxy.plan(epoch)
        for batch_slice in proxy.batch_slices:
            proxy.train_step(plan.take(batch_slice))
    images, labels = trainer.data.train
    with proxy.autocast():
        logits = ic.evaluate(proxy.state.model, images, labels).logits
    return F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)

def train_on_the_hardest(trainer, *arguments):
    order = order_by_loss(trainer)
    hardest = order[: round({share} * len(order))]
    replace(ic.sampling, "balanced_indices", lambda *_, **__: hardest)
    trainer = ic.Trainer(trainer.config, trainer.data, trainer.device, trainer.group)
    return train_epochs(trainer, *arguments)

replace(ic, "train_epochs", train_on_the_hardest)
"""

# Plans an epoch from some images only. It is as long as before: a part of them comes twice.
PLAN_FROM = """
def plan_from(chosen, trainer, epoch):
    config, num_images = trainer.config, len(trainer.train_set.labels)
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(len(chosen), generator=generator)
    again = chosen[order[: num_images - len(chosen)]]
    indices = torch.cat([chosen, again])
    augment = ic.parse_augment(config.augment)
    return ic.plan_epoch(num_images, config.seed, epoch, augment, trainer.device, indices)
"""

# The images with the largest losses, chosen once, after the second epoch.
CHOSEN_ONCE = PLAN_FROM
CHOSEN_ONCE += """
plan = ic.Trainer.plan
chosen = []

def find_hardest(trainer):
    images, labels = trainer.train_set
    with trainer.autocast():
        scale = trainer.state.progress.image_scale
        logits = ic.evaluate(trainer.state.model, images, labels, scale=scale).logits
    order = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)
    return order[: round({share} * len(order))]

def plan_the_hardest(self, epoch):
    if epoch < 2:
        return plan(self, epoch)
    if not chosen:
        chosen.append(find_hardest(self))
    return plan_from(chosen[0], self, epoch)

replace(ic.Trainer, "plan", plan_the_hardest)
"""

# ---- The variants --------------------------------------------------------------------------------

VARIANTS = {
    BASE: Variant(),
    "rate of batch norm's biases x 4": Variant(
        snippet=OWN_RATE.format(condition=IS_BIAS, factor=4)
    ),
    "rate of batch norm's biases x 16": Variant(
        snippet=OWN_RATE.format(condition=IS_BIAS, factor=16)
    ),
    "rate of batch norm's weights / 4": Variant(
        snippet=OWN_RATE.format(condition=IS_NORM_WEIGHT, factor=0.25)
    ),
    "rate of the last layer x 3": Variant(
        snippet=OWN_RATE.format(condition=IS_CLASSIFIER, factor=3)
    ),
    "rate of the last layer / 3": Variant(
        snippet=OWN_RATE.format(condition=IS_CLASSIFIER, factor=1 / 3)
    ),
    "rate of the last layer x 10": Variant(
        snippet=OWN_RATE.format(condition=IS_CLASSIFIER, factor=10)
    ),
    "AdamW's rate x 2": Variant(snippet=OWN_RATE.format(condition="True", factor=2)),
    "AdamW's rate x 4": Variant(snippet=OWN_RATE.format(condition="True", factor=4)),
    "the rate falls with the power 1.2": Variant(snippet=POWER.format(power=1.2)),
    "cifar10-speedrun's coefficients": Variant(snippet=COEFFICIENTS),
    "SOAP": Variant(snippet=SOAP),
    "lookahead": Variant(snippet=LOOKAHEAD),
    "squeeze-and-excitation": Variant(snippet=SQUEEZE_EXCITATION),
    "the classifier sees two stages": Variant(snippet=TWO_STAGES),
    "the first layer halves the size": Variant(snippet=HALVED_FIRST),
    "mean of the last 50 steps": Variant(snippet=LAST_WEIGHTS.format(steps=50, floor=0)),
    "mean of the last 50 steps, rate above 0.2": Variant(
        snippet=LAST_WEIGHTS.format(steps=50, floor=0.2)
    ),
    "smoothing 0.09": Variant("--label-smoothing 0.09"),
    "smoothing 0.09, brightness and contrast": Variant("--label-smoothing 0.09", COLOURS),
    "crops instead of smaller images at first": Variant(snippet=CROPS.format(largest_scale=0.5)),
    "crops instead of smaller images": Variant(snippet=CROPS.format(largest_scale=0.75)),
    "a narrow network leaves out the easiest fifth": Variant(
        "--epochs 12 --drop-easiest 0", PROXY.format(share=0.8)
    ),
    "the easiest third left out, chosen once": Variant(
        "--drop-easiest 0", CHOSEN_ONCE.format(share=0.65)
    ),
    "batches of 250 at first": Variant(snippet=HALF_BATCHES.format(largest_scale=0.5)),
    "batches of 250 on smaller images": Variant(snippet=HALF_BATCHES.format(largest_scale=0.75)),
}


if __name__ == "__main__":
    ablations.main(__doc__, VARIANTS, "learning_ideas")
