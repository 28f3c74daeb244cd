"""A stand-in for HunyuanImage-3.0-Instruct: a small model of our own with the same module names, routing and surface.

It reads text, reasoning and source pictures, answers with the number of its picture's ratio, and draws with flow
matching, two guidance rows and a cache of what it has read. It is as strict as the published code: one request in a
call, a flat list of pictures, no size "auto" to draw at, no guidance of 1, a tokenizer that needs `model_version`.
This file is also what `save` puts into a folder as the model's own code, so it imports nothing but torch, transformers,
numpy and Pillow.

Shapes: n rows, T tokens of a batch, d width, s source or noisy tokens, L tokens read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

PATCH, LATENT = 8, 8
BEGIN, RECAPTION, RATIO, DRAW, NOTHING, PICTURE = 256, 257, 258, 259, 260, 261
THINK = 262
FIRST_RATIO = 263
SIZES = ((32, 32), (24, 40), (40, 24))
"""Heights and widths that it draws."""
TEXT = slice(ord("a"), ord("z") + 1)
"""Reasoning is written in these letters."""
PART = 4
"""Letters of a part of the reasoning; then it ends."""


class StandInConfig(PretrainedConfig):
    model_type = "hunyuan_stand_in"

    def __init__(
        self, hidden_size=32, head_dim=8, num_layers=2, num_experts=4, moe_topk=2, expert_size=12, moe_impl="",
        moe_drop_tokens=True, **rest
    ):  # fmt: skip
        self.hidden_size, self.head_dim, self.num_layers = hidden_size, head_dim, num_layers
        self.num_experts, self.moe_topk, self.expert_size, self.moe_impl = num_experts, moe_topk, expert_size, moe_impl
        self.moe_drop_tokens = moe_drop_tokens
        super().__init__(**rest)


class Gate(nn.Module):
    """`[n, L, d]` -> renormalised softmax gates and expert indices, both `[T, k]`."""

    def __init__(self, config):
        super().__init__()
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.top_k = config.moe_topk

    def forward(self, x):
        weights, indices = self.wg(x.flatten(0, -2)).softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True), indices


class MLP(nn.Module):
    """up * silu(gate), then down; the projection stacks [up, gate]."""

    def __init__(self, config):
        super().__init__()
        self.gate_and_up_proj = nn.Linear(config.hidden_size, 2 * config.expert_size, bias=False)
        self.down_proj = nn.Linear(config.expert_size, config.hidden_size, bias=False)

    def forward(self, x):
        up, gate = self.gate_and_up_proj(x).chunk(2, -1)
        return self.down_proj(up * F.silu(gate))


class Mixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = Gate(config)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))
        self.shared_mlp = MLP(config)

    def forward(self, x):
        weights, indices = self.gate(x)
        tokens = x.flatten(0, -2)
        combined = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = (indices == number).nonzero(as_tuple=True)
            if len(token):
                combined = combined.index_add(0, token, weights[token, slot, None] * expert(tokens[token]))
        return combined.view(x.shape) + self.shared_mlp(x)


class Attention(nn.Module):
    """Grouped queries: half as many key heads. `past`: keys and values `[n, heads, L, head_dim]` of what was read."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.hidden_size // config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, config.hidden_size * 2, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, seen, past):
        d, half = x.shape[-1], x.shape[-1] // 2
        q, k, v = self.qkv_proj(x).split([d, half, half], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=seen[:, None]
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)
        self.mlp = Mixture(config)

    def forward(self, x, seen, past=None):
        mixed, present = self.self_attn(self.input_layernorm(x), seen, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Embedded tokens `[n, L, d]` and what each sees `[n, L, past + L]` -> states `[n, L, d]`, keys and values."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(FIRST_RATIO + len(SIZES), config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.ln_f = nn.RMSNorm(config.hidden_size)

    def forward(self, x, seen, past=None):
        presents = []
        for number, layer in enumerate(self.layers):
            x, present = layer(x, seen, None if past is None else past[number])
            presents.append(present)
        return self.ln_f(x), presents


class VAE(nn.Module):
    """Patches of pixels -> latents with noise, and back."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(3 * PATCH**2, LATENT, bias=False)
        self.leave = nn.Linear(LATENT, 3 * PATCH**2, bias=False)

    def encode(self, picture, draws):
        """`[3, h, w]` in -1..1 -> a sample of its latents `[s, LATENT]`."""
        mean = self.enter(F.pixel_unshuffle(picture[None], PATCH).flatten(2)[0].T)
        return mean + 0.3 * torch.randn(mean.shape, generator=draws).to(mean)

    def decode(self, latents, size):
        """`[s, LATENT]` -> `[3, h, w]` in -1..1."""
        height, width = size[0] // PATCH, size[1] // PATCH
        return F.pixel_shuffle(self.leave(latents).T.unflatten(1, (height, width))[None], PATCH)[0].tanh()


class ImageProcessor:
    img_ratio_slice_logits_processor = None
    vae_reso_group = SIZES

    def build_img_ratio_slice_logits_proc(self, tokenizer):
        self.img_ratio_slice_logits_processor = [tokenizer]

    def postprocess_outputs(self, outputs, batch_cond_images, infer_align_image_size=False):
        """In place: a picture of its source's ratio gets the source's aspect."""
        (sources,) = batch_cond_images
        width, height = sources[0].size
        if infer_align_image_size and nearest(width, height) == outputs[0].size[::-1]:
            scale = (32 * 32 / (width * height)) ** 0.5
            outputs[0] = outputs[0].resize((round(width * scale), round(height * scale)))


def nearest(width, height):
    """The size that it draws whose ratio is nearest."""
    return min(SIZES, key=lambda size: abs(size[0] / size[1] - height / width))


class Tokenizer:
    """Bytes; "(" and "[" begin the parts of the reasoning, ")" and "]" end them."""

    think_token, recaption_token = "(", "["
    end_of_think_token_id, end_of_recaption_token_id = ord(")"), ord("]")

    def decode(self, tokens):
        return bytes(tokens).decode()


def get_system_prompt(sys_type, bot_task, system_prompt=None):
    return f" {sys_type}: "


class StandIn(PreTrainedModel, GenerationMixin):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        if config.moe_impl != "eager" or config.moe_drop_tokens:
            raise ValueError(f"expected experts that drop no tokens, got {config.moe_impl!r} {config.moe_drop_tokens}")
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, self.model.wte.num_embeddings, bias=False)
        self.vae = VAE()
        self.patch_embed = nn.Linear(LATENT, config.hidden_size)
        self.vision_model = nn.Linear(3, config.hidden_size)
        self.time_embed = nn.Linear(1, config.hidden_size)
        self.final_layer = nn.Linear(config.hidden_size, LATENT)
        self._tokenizer = None
        self.image_processor = ImageProcessor()
        self.post_init()

    def _init_weights(self, module):
        """Weights come from `save`."""

    def load_tokenizer(self, tokenizer):
        assert self.config.model_version == "HunyuanImage-3.0-Instruct"
        json.loads((Path(tokenizer) / "stand_in_tokenizer.json").read_text())
        self._tokenizer = Tokenizer()

    def prepare_model_inputs(
        self, *, prompt, image, cot_text=None, mode="gen_text", bot_task="auto", image_size="auto", seed=None,
        max_new_tokens=None, system_prompt=None, infer_align_image_size=False, drop_think=None,
    ):  # fmt: skip
        for each in image:
            assert isinstance(each, Image.Image), f"`image` should be a list of PIL images, but got {type(each)}"
        for text in (prompt, cot_text, system_prompt):
            if text is not None and not (isinstance(text, str) and text):
                raise ValueError(f"expected one text, not empty, got {text!r}")
        if cot_text and (getattr(self.generation_config, "drop_think", False) if drop_think is None else drop_think):
            cot_text = cot_text.rpartition(")")[2]
        draws = torch.Generator().manual_seed(seed)
        last = DRAW if mode == "gen_image" else {"think": THINK, "recaption": RECAPTION, "img_ratio": RATIO}[bot_task]
        small = [self._sized(each, infer_align_image_size) for each in image]
        rows = [self._read((system_prompt or "") + prompt, cot_text or "", small, draws, last)]
        inputs = {"mode": mode, "max_new_tokens": max_new_tokens, "bot_task": bot_task, "rows": rows, "draws": draws}
        if mode == "gen_image":
            if image_size == "auto":
                raise ValueError("`image_size` should be in the format of 'HxW', 'W:H' or <img_ratio_i>, got auto.")
            if image_size.startswith("<img_ratio_"):
                inputs["size"] = SIZES[int(image_size.removeprefix("<img_ratio_").removesuffix(">"))]
            else:
                first, second = (int(side) for side in image_size.replace(":", "x").split("x"))
                inputs["size"] = nearest(first, second) if ":" in image_size else nearest(second, first)
            rows.append(self._read("", "", small, torch.Generator().manual_seed(seed), last))
        longest = max(len(row) for row in rows)
        return {**inputs, "input_ids": torch.zeros(len(rows), longest, dtype=torch.long), "batch_cond_images": [image]}

    @torch.no_grad()
    def generate(
        self, *, mode, rows, draws, bot_task, max_new_tokens, input_ids, batch_cond_images, size=None,  # noqa: ARG002
        generation_config=None, do_sample=None, logits_processor=None,
    ):  # fmt: skip
        how = generation_config or self.generation_config
        if mode == "gen_image":
            return self._draw(
                rows, draws, size,
                diff_infer_steps=how.diff_infer_steps, diff_guidance_scale=how.diff_guidance_scale,
            )  # fmt: skip
        sample = how.do_sample if do_sample is None else do_sample
        if (bot_task == "img_ratio") != (logits_processor is not None):
            raise ValueError("expected only ratios where one is asked for")
        new = self._write(rows[0], bot_task, max_new_tokens, sample)
        return torch.cat([input_ids, torch.tensor([new])], dim=1)

    def prefill(self, rows):
        """Rows `[L, d]` of any lengths -> `ln_f`'s states `[n, L, d]`, keys and values, the mask; padded in front."""
        x, seen, real = self.padded(rows)
        states, cache = self.model(x, seen)
        return states, cache, real

    def padded(self, rows):
        longest = max(len(row) for row in rows)
        x = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        real = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).to(x.device)
        # Padding sees itself, so that no row of the attention is empty.
        own = torch.eye(longest, dtype=torch.bool, device=x.device)
        return x, (torch.ones_like(own).tril() & real[:, None]) | own, real

    def _read(self, prompt, cot, pictures, draws, last):
        """Everything of one request as embedded tokens `[L, d]`, places added."""
        words = [BEGIN, *(prompt.encode() or [NOTHING]), *cot.encode()]
        parts = [self._words(words)]
        for picture in pictures:
            small = picture.resize((32, 32))
            pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)
            pixels = pixels.to(self.lm_head.weight)
            parts += [self._words([PICTURE]), self.patch_embed(self.vae.encode(pixels, draws))]
            parts += [self.vision_model(pixels.flatten(1).mean(1))[None]]
        row = torch.cat([*parts, self._words([last])])
        return row + self._places(torch.arange(len(row)))

    def _words(self, ids):
        return self.model.wte(torch.tensor(ids, device=self.lm_head.weight.device))

    def _places(self, index):
        rates = 100.0 ** -torch.linspace(0, 1, self.config.hidden_size // 2)
        angles = index[:, None] * rates
        return 0.5 * torch.cat([angles.sin(), angles.cos()], -1).to(self.lm_head.weight)

    def _sized(self, picture, aligned):
        """Resized to a size that it draws, or cropped to one."""
        height, width = nearest(*picture.size)
        if not aligned:
            scale = min(picture.width / width, picture.height / height)
            box = (round(width * scale), round(height * scale))
            left, top = (picture.width - box[0]) // 2, (picture.height - box[1]) // 2
            picture = picture.crop((left, top, left + box[0], top + box[1]))
        return picture.convert("RGB").resize((width, height))

    def _write(self, row, task, most, sample):
        """Token ids; of the ratio, its number: the logits processor leaves only ratios in the vocabulary."""
        written = []
        for number in range(most):
            states, _, _ = self.prefill([row])
            logits = self.lm_head(states[0, -1])
            if task == "img_ratio":
                return [int(logits[FIRST_RATIO:].argmax())]
            if number == PART:
                return [*written, ord(")" if task == "think" else "]")]
            letters = logits[TEXT].float()
            chosen = letters.softmax(-1).multinomial(1) if sample else letters.argmax()
            written.append(TEXT.start + int(chosen))
            row = torch.cat([row, self._words(written[-1:]) + self._places(torch.tensor([len(row)]))])
        return written

    def _draw(self, rows, draws, size, *, diff_infer_steps, diff_guidance_scale):
        if diff_guidance_scale <= 1:
            raise RuntimeError(f"Expected index [{len(rows)}] to be no larger size than src [1]")
        tokens = size[0] // PATCH * (size[1] // PATCH)
        x = torch.randn(tokens, LATENT, generator=draws).to(self.lm_head.weight)[None]
        cache = None
        for step in range(diff_infer_steps):
            time = torch.full((1, 1, 1), 1 - step / diff_infer_steps).to(x)
            if cache is None:
                _, cache, real = self.prefill(rows)
            noisy = self.patch_embed(torch.cat([x, x])) + self.time_embed(time)
            noisy = noisy + self._places(torch.arange(500, 500 + tokens))
            seen = F.pad(real, (0, tokens), value=True)[:, None].expand(-1, tokens, -1)
            states, _ = self.model(noisy, seen, cache)
            with_text, without = self.final_layer(states).chunk(2)
            x = x - (without + diff_guidance_scale * (with_text - without)) / diff_infer_steps
        return [_picture(self.vae.decode(x[0], size))]


def _picture(pixels):
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def made(**sizes):
    """A model with random weights, its tokenizer read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StandIn(StandInConfig(moe_impl="eager", moe_drop_tokens=False, **sizes))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=(2.0 if "wg" in name else 1.0) * parameter.shape[1] ** -0.5)
            elif "norm" not in name and "ln_f" not in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
        nn.init.normal_(model.model.wte.weight, std=0.5)
    model.generation_config = GenerationConfig(
        diff_guidance_scale=3.0, diff_infer_steps=7, use_system_prompt="None", do_sample=True
    )
    model._tokenizer = Tokenizer()
    return model.eval()


def save(folder, **sizes):
    """A folder as the user's download is one: weights, config with `auto_map`, and this file as the model's code."""
    model = made(**sizes)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = "modeling_hunyuan_stand_in"
    config["auto_map"] = {"AutoConfig": f"{code}.StandInConfig", "AutoModelForCausalLM": f"{code}.StandIn"}
    config["moe_impl"], config["moe_drop_tokens"] = "", True  # the folder leaves the choice to whoever loads it
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stand_in_tokenizer.json").write_text("{}")
    shutil.copy(__file__, folder / f"{code}.py")
    return model
