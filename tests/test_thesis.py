"""Checkpoints of the thesis' code become our model, to the last key and to the fifth decimal.

The checkpoints are synthetic: random weights under the names that code used. What they must compute is written down
here once more, from the formulas alone, with transformers' own SwinModel as the encoder.
"""

import json
import re
import sys
import types

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import batch_norm, conv2d, gelu, layer_norm, linear, silu
from transformers import Qwen3Config, Qwen3ForCausalLM, SwinConfig, SwinModel

from lightmedvlm_utils.cli import main
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.thesis import load_thesis_checkpoint

SIZE, C, D, HEADS, RANK = 56, 32, 48, 8, 4
LLM_PREFIX = {"report": "llama_model.", "vqa": "model.", "baseline": "model."}
CONNECTOR = {"report": "llama_proj.", "vqa": "llm_proj.", "baseline": "proj."}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, tiny_tokenizer):
    """Folders of an encoder and a language model of the checkpoint's sizes; their weights are other ones."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbones")
    arguments = {"img_size": SIZE, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    vision = {"architecture": "swin_tiny_patch4_window7_224", "arguments": arguments}
    (folder / "swin").mkdir()
    (folder / "swin/config.json").write_text(json.dumps(vision | {"mean": [0.5] * 3, "std": [0.25] * 3}))
    encoder = timm.create_model(vision["architecture"], num_classes=0, **arguments)
    save_file(encoder.state_dict(), folder / "swin/model.safetensors")
    small_llm(tiny_tokenizer).save_pretrained(folder / "qwen3")
    tiny_tokenizer.save_pretrained(folder / "qwen3")
    return {"vision": str(folder / "swin"), "language_model": str(folder / "qwen3")}


def small_llm(tokenizer):
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=D,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        )
    )


def old_names(swin):
    """The state dict of a SwinModel under the names that transformers 4 gave it."""
    renamed = {}
    for name, value in swin.state_dict().items():
        for new, old in (
            ("attention.q_proj", "attention.self.query"),
            ("attention.k_proj", "attention.self.key"),
            ("attention.v_proj", "attention.self.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("attention.relative_position_bias.relative", "attention.self.relative"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            name = name.replace(new, old)
        renamed[name] = value
    for name, module in swin.named_modules():
        if name.endswith("relative_position_bias"):
            old = name.replace("relative_position_bias", "self.relative_position_index")
            renamed[old] = module.relative_position_index.view(49, 49).clone()
    return renamed


def connector_weights(stage):
    """Random weights of SASA or of the projector, under their names there."""
    shapes = {"hidden_1.weight": (2 * C, C), "hidden_1.bias": (2 * C,), "hidden_2.weight": (D, 2 * C)}
    shapes["hidden_2.bias"] = (D,)
    if stage != "baseline":
        shapes = {"latents": (1, 64, D), "vis_proj.weight": (D, C), "vis_proj.bias": (D,)}
        for i in (0, 3):
            shapes |= {f"conv_block.{i}.weight": (C, C, 3, 3), f"conv_block.{i}.bias": (C,)}
            norm = f"conv_block.{i + 1}"
            shapes |= {f"{norm}.{part}": (C,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {"cross_attn.in_proj_weight": (3 * D, D), "cross_attn.in_proj_bias": (3 * D,)}
        shapes |= {"cross_attn.out_proj.weight": (D, D), "cross_attn.out_proj.bias": (D,)}
        shapes |= {f"{norm}.{part}": (D,) for norm in ("ln_q", "ln_v", "ln_out") for part in ("weight", "bias")}
        shapes |= {"mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,), "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,)}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    for name in list(weights):
        if name.endswith("running_var"):
            weights[name] = 0.5 + weights[name].abs()
            weights[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return weights


def checkpoint(stage, tokenizer, with_lora=False, trainable_only=False, llm=None):
    """(state dict, the parts it was made of)."""
    torch.manual_seed(0)
    swin = SwinModel(
        SwinConfig(image_size=SIZE, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7),
        add_pooling_layer=False,
    ).eval()
    for parameter in swin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    llm, connector = llm or small_llm(tokenizer), connector_weights(stage)
    outer = {"weight": torch.randn(D), "bias": torch.randn(D)}
    language = {name: value.clone() for name, value in llm.state_dict().items()}
    if with_lora:
        adapters = {}
        for name in [name for name in language if re.search(r"[qkvo]_proj\.weight", name)]:
            (rows, columns), layer = language[name].shape, name.removesuffix(".weight")
            a, b = torch.randn(RANK, columns), 0.1 * torch.randn(rows, RANK)
            adapters |= {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
            adapters[f"{layer}.base_layer.weight"] = language.pop(name)
            with torch.no_grad():  # what the model with its adapter computes: W + alpha / r B A
                llm.get_submodule(layer).weight += 16 / RANK * b @ a
        language = {f"base_model.model.{name}": value for name, value in (language | adapters).items()}
    if trainable_only:
        language = {name: value for name, value in language.items() if lora.is_lora(name)}
    state = {f"visual_encoder.{name}": value for name, value in old_names(swin).items()}
    state |= {CONNECTOR[stage] + name: value for name, value in connector.items()}
    state |= {f"layer_norm.{name}": value for name, value in outer.items()}
    state |= {LLM_PREFIX[stage] + name: value for name, value in language.items()}
    if trainable_only:
        state = {n: v for n, v in state.items() if not re.search(r"running_|num_batches|position_index", n)}
    else:
        state |= {"embed_tokens.weight": llm.get_input_embeddings().weight.detach().clone()}
        state |= {"lm_head.weight": llm.get_input_embeddings().weight.detach().clone()}
    return state, (swin, connector, outer, llm.eval())


def formulas(stage, features, w, outer):
    """Encoder tokens (B, 49, C) to the language model's tokens (B, Q, D): the thesis' steps 1 to 7."""

    def norm(x, name):
        return layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"])

    if stage == "baseline":
        hidden = gelu(linear(features, w["hidden_1.weight"], w["hidden_1.bias"]))
        tokens = linear(hidden, w["hidden_2.weight"], w["hidden_2.bias"])
        return layer_norm(tokens, (D,), outer["weight"], outer["bias"])
    x = features.transpose(1, 2).reshape(-1, C, 7, 7)
    for i in (0, 3):
        x = conv2d(x, w[f"conv_block.{i}.weight"], w[f"conv_block.{i}.bias"], padding=1)
        mean, var = w[f"conv_block.{i + 1}.running_mean"], w[f"conv_block.{i + 1}.running_var"]
        x = silu(batch_norm(x, mean, var, w[f"conv_block.{i + 1}.weight"], w[f"conv_block.{i + 1}.bias"]))
    keys = norm(linear(x.flatten(2).transpose(1, 2), w["vis_proj.weight"], w["vis_proj.bias"]), "ln_v")
    latents = w["latents"].expand(len(features), -1, -1)
    queries = norm(latents, "ln_q")
    projections = zip(w["cross_attn.in_proj_weight"].chunk(3), w["cross_attn.in_proj_bias"].chunk(3), strict=True)
    q, k, v = (
        linear(inputs, weight, bias).unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2)
        for inputs, (weight, bias) in zip((queries, keys, keys), projections, strict=True)
    )
    attention = (q @ k.transpose(-2, -1) / (D // HEADS) ** 0.5).softmax(-1)
    heard = (attention @ v).transpose(1, 2).flatten(2)
    heard = linear(heard, w["cross_attn.out_proj.weight"], w["cross_attn.out_proj.bias"])
    x = norm((latents if stage == "report" else queries) + heard, "ln_out")
    x = x + linear(gelu(linear(x, w["mlp.0.weight"], w["mlp.0.bias"])), w["mlp.2.weight"], w["mlp.2.bias"])
    return layer_norm(x, (D,), outer["weight"], outer["bias"])


def write(path, state):
    """As Lightning writes it, its AttributeDict of hyper-parameters included."""
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    names = ["lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__]
    sys.modules |= dict.fromkeys(names, module)
    try:
        settings = module.AttributeDict(lr=1e-4, llm="Qwen/Qwen3-0.6B")
        torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"args": settings}}, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path


@pytest.mark.parametrize("stage", ["report", "vqa", "baseline"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_the_imported_model_computes_the_formulas(stage, with_lora, backbones, tiny_tokenizer, tmp_path):
    state, (swin, connector, outer, llm) = checkpoint(stage, tiny_tokenizer, with_lora)
    model, processor, account = load_thesis_checkpoint(write(tmp_path / "a.ckpt", state), **backbones)
    assert account.stage == stage and account.read == len(state) and not account.from_backbones
    images = [np.random.default_rng(i).random((SIZE, SIZE), np.float32) for i in range(3)]
    inputs = processor([images[:2], images[2:]])
    with torch.no_grad():
        views = zip(inputs["pixel_values"], inputs["view_mask"], strict=True)
        seen = [swin(view[mask]).last_hidden_state for view, mask in views]
        features = torch.stack([tokens.mean(0) for tokens in seen])
        tokens = formulas(stage, features, connector, outer)
        embeddings = llm.get_input_embeddings()(inputs["input_ids"])
        embeddings[inputs["input_ids"] == processor.image_token_id] = tokens.flatten(0, 1)
        logits = llm(inputs_embeds=embeddings).logits
        ours = model.encode_images(inputs["pixel_values"], inputs["view_mask"])
        torch.testing.assert_close(ours, features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.connector(ours), tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, logits_to_keep=0).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_file_of_trainable_parameters_alone_takes_the_rest_from_the_backbones(
    with_lora, backbones, tiny_tokenizer, tmp_path
):
    frozen = Qwen3ForCausalLM.from_pretrained(backbones["language_model"])
    state, (*_, llm) = checkpoint("report", tiny_tokenizer, with_lora, trainable_only=True, llm=frozen)
    model, processor, account = load_thesis_checkpoint(write(tmp_path / "a.ckpt", state), **backbones)
    assert account.read == len(state) and account.from_backbones == ["language model"]
    assert {name.split(".")[-1] for name in account.untouched} == {"running_mean", "running_var", "num_batches_tracked"}
    assert "left at their start" in str(account)
    ids = processor.for_generation(["effusion"])["input_ids"]
    torch.testing.assert_close(model.merge_lora().language_model(ids).logits, llm(ids).logits, atol=1e-5, rtol=1e-5)


def damaged(state, change):
    state = dict(state)
    if change == "a key too many":
        state["visual_encoder.encoder.layers.0.blocks.0.attention.self.gate"] = torch.zeros(1)
    elif change == "a key of nobody":
        state["optimizer.step"] = torch.zeros(1)
    elif change == "a key too few":
        del state["llama_proj.ln_out.bias"]
    elif change == "a layer too few":
        state = {name: value for name, value in state.items() if "llama_model.model.layers.1.mlp" not in name}
    elif change == "a part too few":
        del state["visual_encoder.encoder.layers.1.blocks.0.attention.self.key.bias"]
    elif change == "another shape":
        state["layer_norm.weight"] = torch.zeros(D + 1)
    elif change == "another embedding":
        state["embed_tokens.weight"] = state["embed_tokens.weight"] + 1
    elif change == "another window":
        name = "visual_encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
        state[name] = state[name].flip(0)
    elif change == "no connector":
        state = {name: value for name, value in state.items() if not name.startswith("llama_proj")}
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("a key too many", "belong to no part"),
        ("a key of nobody", "belong to no part"),
        ("a key too few", "misses"),
        ("a layer too few", "misses"),
        ("a part too few", "incomplete"),
        ("another shape", "another shape"),
        ("another embedding", "differs"),
        ("another window", "not that of this encoder"),
        ("no connector", "no thesis checkpoint"),
    ],
)
def test_every_key_is_accounted_for(change, sentence, backbones, tiny_tokenizer, tmp_path):
    state, _ = checkpoint("report", tiny_tokenizer)
    with pytest.raises(UserError, match=sentence):
        load_thesis_checkpoint(write(tmp_path / "a.ckpt", damaged(state, change)), **backbones)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint has run')",))


def test_nothing_in_a_checkpoint_is_executed(backbones, tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="could run code"):
        load_thesis_checkpoint(tmp_path / "evil.ckpt", **backbones)
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    for name in ("text.ckpt", "nowhere.ckpt"):
        with pytest.raises(UserError, match=r"\.ckpt"):
            load_thesis_checkpoint(tmp_path / name, **backbones)


def test_the_command_writes_a_checkpoint_folder(backbones, tiny_tokenizer, tmp_path, capsys):
    state, _ = checkpoint("vqa", tiny_tokenizer, with_lora=True)
    path, folder = write(tmp_path / "a.ckpt", state), tmp_path / "imported"
    command = ["import-thesis", str(path), str(folder), "--vision", backbones["vision"]]
    command += ["--language-model", backbones["language_model"]]
    assert main([*command, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["stage"] == "vqa" and account["read"] == len(state)
    expected = load_thesis_checkpoint(path, **backbones)[0].state_dict()
    imported = LightMedVLM.from_pretrained(folder).state_dict()
    assert set(imported) == set(expected)
    assert all(torch.equal(imported[name], value) for name, value in expected.items())
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
