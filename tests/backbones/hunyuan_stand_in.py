"""A stand-in for HunyuanImage-3.0-Instruct: a small model of our own with the same module names, routing and surface.

It reads text, reasoning and source pictures, says the shape of its picture as a token, and draws with flow matching,
two guidance rows and a cache of what it has read. This file is also what `save` puts into a folder as the model's own
code, so it imports nothing but torch, transformers, numpy and Pillow.

Shapes: b requests, n rows, T tokens of a batch, d width, s source or noisy tokens, L tokens read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

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


class StandInConfig(PretrainedConfig):
    model_type = "hunyuan_stand_in"

    def __init__(
        self, hidden_size=32, head_dim=8, num_layers=2, num_experts=4, moe_topk=2, expert_size=12, moe_impl="", **rest
    ):
        self.hidden_size, self.head_dim, self.num_layers = hidden_size, head_dim, num_layers
        self.num_experts, self.moe_topk, self.expert_size, self.moe_impl = num_experts, moe_topk, expert_size, moe_impl
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

    def build_img_ratio_slice_logits_proc(self, tokenizer):
        self.img_ratio_slice_logits_processor = [tokenizer]


def get_system_prompt(sys_type, bot_task, system_prompt=None):
    return f" {sys_type}: " if sys_type != "None" else None


class StandIn(PreTrainedModel, GenerationMixin):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        if config.moe_impl != "eager":
            raise ValueError(f"moe_impl: expected eager, got {config.moe_impl!r}")
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, self.model.wte.num_embeddings, bias=False)
        self.vae = VAE()
        self.patch_embed = nn.Linear(LATENT, config.hidden_size)
        self.vision_model = nn.Linear(3, config.hidden_size)
        self.time_embed = nn.Linear(1, config.hidden_size)
        self.final_layer = nn.Linear(config.hidden_size, LATENT)
        self.tokenizer = None
        self._tokenizer = SimpleNamespace(think_token="(", recaption_token=")")
        self.image_processor = ImageProcessor()
        self.post_init()

    def _init_weights(self, module):
        """Weights come from `save`."""

    def load_tokenizer(self, tokenizer):
        self.tokenizer = json.loads((Path(tokenizer) / "stand_in_tokenizer.json").read_text())

    def prepare_model_inputs(
        self, *, prompt, image, cot_text=None, mode="gen_text", bot_task="auto", image_size="auto", seed=None,
        max_new_tokens=None, system_prompt=None,
    ):  # fmt: skip
        if self.tokenizer is None:
            raise RuntimeError("load_tokenizer first")
        for texts in (prompt, cot_text, system_prompt):
            if texts is not None and not (len(texts) == len(prompt) and all(texts)):
                raise ValueError(f"expected {len(prompt)} texts, none empty, got {texts}")
        draws = [torch.Generator().manual_seed(each) for each in seed]
        cot = cot_text or [""] * len(prompt)
        last = DRAW if mode == "gen_image" else {"think": THINK, "recaption": RECAPTION, "img_ratio": RATIO}[bot_task]
        system = system_prompt or [""] * len(prompt)
        asked = [before + text for before, text in zip(system, prompt, strict=True)]
        rows = [self._read(*each, last) for each in zip(asked, cot, image, draws, strict=True)]
        inputs = {"mode": mode, "max_new_tokens": max_new_tokens, "bot_task": bot_task, "rows": rows, "draws": draws}
        if mode == "gen_image":
            number = 0 if image_size == "auto" else int(image_size.removeprefix("<img_ratio_").removesuffix(">"))
            inputs["size"] = SIZES[number]
            inputs["unguided"] = [
                self._read("", "", pictures, torch.Generator().manual_seed(each), last)
                for pictures, each in zip(image, seed, strict=True)
            ]
        return inputs

    @torch.no_grad()
    def generate(
        self, *, mode, rows, draws, bot_task, max_new_tokens, size=None, unguided=None, generation_config=None,
        decode_text=False, do_sample=True, logits_processor=None,
    ):  # fmt: skip
        if mode == "gen_image":
            how = generation_config or self.generation_config
            return self._draw(
                rows, unguided, draws, size,
                diff_infer_steps=how.diff_infer_steps, diff_guidance_scale=how.diff_guidance_scale,
            )  # fmt: skip
        if do_sample or len(rows) != 1 or (bot_task == "img_ratio") != (logits_processor is not None):
            raise ValueError("expected one greedy text, and only ratios where one is asked for")
        text = self._write(rows[0], bot_task, max_new_tokens)
        return [text] if decode_text else torch.tensor([[*text.encode()]])

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
            small = picture.convert("RGB").resize((32, 32))
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

    def _write(self, row, task, most):
        written = ""
        for _ in range(most):
            states, _, _ = self.prefill([row])
            logits = self.lm_head(states[0, -1])
            if task == "img_ratio":
                return f"<img_ratio_{int(logits[FIRST_RATIO:].argmax())}>"
            letter = TEXT.start + int(logits[TEXT].argmax())
            written += chr(letter)
            row = torch.cat([row, self._words([letter]) + self._places(torch.tensor([len(row)]))])
        return written

    def _draw(self, rows, unguided, draws, size, *, diff_infer_steps, diff_guidance_scale):
        guided = diff_guidance_scale > 1
        rows = [*rows, *unguided] if guided else rows
        tokens = size[0] // PATCH * (size[1] // PATCH)
        x = torch.stack([torch.randn(tokens, LATENT, generator=each) for each in draws]).to(self.lm_head.weight)
        cache = None
        for step in range(diff_infer_steps):
            time = torch.full((1, 1, 1), 1 - step / diff_infer_steps).to(x)
            if cache is None:
                _, cache, real = self.prefill(rows)
            noisy = self.patch_embed(torch.cat([x, x]) if guided else x) + self.time_embed(time)
            noisy = noisy + self._places(torch.arange(500, 500 + tokens))
            seen = F.pad(real, (0, tokens), value=True)[:, None].expand(-1, tokens, -1)
            states, _ = self.model(noisy, seen, cache)
            velocity = self.final_layer(states)
            if guided:
                with_text, without = velocity.chunk(2)
                velocity = without + diff_guidance_scale * (with_text - without)
            x = x - velocity / diff_infer_steps
        return [_picture(self.vae.decode(each, size)) for each in x]


def _picture(pixels):
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def made(**sizes):
    """A model with random weights, its tokenizer read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StandIn(StandInConfig(moe_impl="eager", **sizes))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=(2.0 if "wg" in name else 1.0) * parameter.shape[1] ** -0.5)
            elif "norm" not in name and "ln_f" not in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
        nn.init.normal_(model.model.wte.weight, std=0.5)
    model.generation_config = GenerationConfig(
        diff_guidance_scale=3.0, diff_infer_steps=7, use_system_prompt="en_unified"
    )
    model.tokenizer = {}
    return model.eval()


def save(folder, **sizes):
    """A folder as the user's download is one: weights, config with `auto_map`, and this file as the model's code."""
    model = made(**sizes)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = "modeling_hunyuan_stand_in"
    config["auto_map"] = {"AutoConfig": f"{code}.StandInConfig", "AutoModelForCausalLM": f"{code}.StandIn"}
    config["moe_impl"] = ""  # the folder leaves the choice to whoever loads it
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stand_in_tokenizer.json").write_text("{}")
    shutil.copy(__file__, folder / f"{code}.py")
    return model
