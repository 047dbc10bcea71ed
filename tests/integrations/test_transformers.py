"""A memory in models of transformers: pieces, generation, padding, training, saving."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from htm_pytorch import ChunkedMemory, memory
from htm_pytorch.integrations.transformers import (
    HTMCache,
    add_memory,
    add_stored_memory,
    load_memory,
)
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS, DIM, LAYERS, CHUNK = 64, 32, 3, 4
SIZES: dict[str, Any] = {"topk_mems": 2, "mem_chunk_size": CHUNK, "heads": 2, "dim_head": 8}
COMMON: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))


def qwen() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON))


def mistral() -> Any:
    """Attends to the newest 8 tokens only."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, sliding_window=8))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=DIM, n_layer=LAYERS, n_head=4, n_positions=256,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, loss_type="ForCausalLM",
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODELS = [llama, qwen, mistral, gpt2]


def blocks(model: Any) -> list[Any]:
    return [module.htm for module in model.modules() if hasattr(module, "htm")]


def remembering(make: Callable[[], Any], chunks: int = 8, detach_memories: bool = True) -> Any:
    """A model whose memories change its outputs."""
    model = make().eval()
    add_memory(model, [0, 2], mem_chunks=chunks, detach_memories=detach_memories, **SIZES)
    for block in blocks(model):
        nn.init.normal_(block.attn.attn.to_out.weight, std=0.5)
    return model


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return remembering(request.param)


def tokens(rows: int = 2, length: int = 60) -> Tensor:
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_begins_unchanged(make: Callable[[], Any]) -> None:
    model = make().eval()
    names = set(model.state_dict())
    before = model(tokens()).logits
    add_memory(model, range(LAYERS), **SIZES)
    assert model(tokens()).logits.equal(before)
    assert all(".htm." in name for name in set(model.state_dict()) - names)
    assert names < set(model.state_dict())


@torch.no_grad()
def test_pieces_give_what_the_whole_gives(model: Any) -> None:
    # 15 chunks close, and 8 are remembered.
    whole = model(tokens()).logits
    cache = HTMCache(config=model.config)
    pieces = [model(piece, cache=cache).logits for piece in tokens().split([17, 1, 30, 1, 11], 1)]
    assert_near(torch.cat(pieces, 1), whole, 1e-5)
    assert_near(model(tokens(), use_cache=False).logits, whole, 1e-5)


@torch.no_grad()
def test_only_closed_chunks_are_recalled_and_steps_are_positions() -> None:
    model = remembering(llama)
    plain = copy.deepcopy(model)
    for block in blocks(plain):
        nn.init.zeros_(block.attn.attn.to_out.weight)
    cache = HTMCache(config=model.config)
    apart = (model(tokens(), cache=cache).logits - plain(tokens()).logits).abs().amax(-1)
    assert not apart[:, :CHUNK].any() and (apart[:, CHUNK:] > 0).all()
    spans = cache.memories[0].spans(torch.arange(8))
    assert sorted(span.first_step for span in spans) == list(range(28, 60, CHUNK))
    given = model(tokens(), output_hidden_states=True).hidden_states
    # Hidden state 1 is what layer 0 and its block return; the layer's own output went in.
    assert_near(cache.memories[0].contents[:, 0], plain_output(model)[:, 32:36], 1e-5)
    assert (given[1] - plain_output(model)).abs().max() > 0.01


def plain_output(model: Any) -> Tensor:
    """What the first layer returns, without its block."""
    heard: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *a: heard.append(a[2]))
    heard_before: list[Tensor] = []
    norm = model.model.layers[0].post_attention_layernorm
    other = norm.register_forward_pre_hook(lambda _, args: heard_before.append(args[0]))
    model(tokens())
    handle.remove()
    other.remove()
    return heard_before[0] + heard[0]


@torch.no_grad()
def test_generation_remembers_without_being_told_to(model: Any) -> None:
    made = model.generate(tokens(), max_new_tokens=20, do_sample=False)
    best = model(made[:, :-1]).logits[:, -20:].argmax(-1)
    assert made[:, -20:].equal(best)
    cache = HTMCache(config=model.config)
    again = model.generate(tokens(), max_new_tokens=20, do_sample=False, cache=cache)
    assert again.equal(made)
    assert cache.memories[0].step_count.tolist() == [79, 79]


@torch.no_grad()
def test_sampling_draws_by_the_whole_pass(model: Any) -> None:
    made = model.generate(
        tokens(), max_new_tokens=12, do_sample=True, top_k=0, num_return_sequences=2,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = model(made.sequences[:, :-1]).logits[:, -12:]
    assert_near(torch.stack(made.logits, 1), whole, 1e-5)


@torch.no_grad()
def test_beam_search_takes_the_memories_along(model: Any) -> None:
    made = model.generate(
        tokens(), max_new_tokens=12, num_beams=4, do_sample=False, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = model(made.sequences[:, :-1]).logits[:, -12:].log_softmax(-1)
    scores = logits.gather(2, made.sequences[:, -12:, None]).sum((1, 2))
    assert_near(made.sequences_scores, scores, 1e-5)
    # Beams were exchanged, so that rows that stay would have been wrong.
    parents = made.beam_indices[:, 1:12] - made.beam_indices[:, :11]
    assert parents.any()


@torch.no_grad()
def test_rows_of_a_cache_are_selected_and_repeated(model: Any) -> None:
    first, second = tokens().split(30, 1)
    expected = model(tokens()).logits[:, 30:]
    cache = HTMCache(config=model.config)
    model(first, cache=cache)
    order = torch.tensor([1, 0])
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(order)
    assert_near(model(second[order], cache=chosen).logits, expected[order], 1e-5)
    cache.batch_repeat_interleave(2)
    repeated = model(second.repeat_interleave(2, 0), cache=cache).logits
    assert_near(repeated, expected.repeat_interleave(2, 0), 1e-5)


@torch.no_grad()
def test_padding_is_not_remembered(model: Any) -> None:
    rows = [tokens(1, 30), tokens(1, 43)]
    padded = torch.zeros(2, 43, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for number, row in enumerate(rows):
        padded[number, -row.shape[1] :] = row
        mask[number, -row.shape[1] :] = 1
    options = {"max_new_tokens": 20, "do_sample": False}
    made = model.generate(padded, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        alone = model.generate(row, **options)
        assert made[number, -20:].equal(alone[0, -20:])


def test_gradients_reach_the_blocks_and_checkpointing_does_not_change_them() -> None:
    for make in (llama, gpt2):
        model = remembering(make, detach_memories=False).train()
        gradients = []
        for checkpoints in (False, True):
            if checkpoints:
                model.activation_checkpointing_enable()
            model.zero_grad()
            mask = torch.ones_like(tokens())
            mask[0, :9] = 0
            model(tokens(), attention_mask=mask, labels=tokens(), use_cache=False).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert gradients[1][name].equal(gradient), name
            # A bias of the summaries' keys adds the same to all scores.
            assert gradient.any() or name.endswith("to_summary_keys.bias"), name


def test_an_optimizer_step_opens_the_memory() -> None:
    model = llama().train()
    add_memory(model, [1], **SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        made = model(tokens(), labels=tokens())
        assert type(made.cache) is DynamicCache, "room for all chunks was taken in training"
        made.loss.backward()
        optimizer.step()
    (block,) = blocks(model)
    assert block.attn.attn.to_out.weight.any()
    assert block.attn.to_summary_queries.weight.grad.any()


def test_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    model = remembering(llama)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="call add_memory before"):
        load_memory(loaded, tmp_path)
    add_memory(loaded, [0, 2], mem_chunks=8, **SIZES)
    load_memory(loaded, tmp_path)
    assert loaded(tokens()).logits.equal(model(tokens()).logits)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    add_memory(other, [0, 1], mem_chunks=8, **SIZES)
    with pytest.raises(
        ValueError, match=r"expected the memories that the model has, .*, got .*layers\.2\.htm"
    ):
        load_memory(other, tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match=r"got .* without one; save the model after add_memory"):
        load_memory(loaded, tmp_path / "without")
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        load_memory(loaded, tmp_path / "elsewhere")


def test_a_copy_is_its_own() -> None:
    model = remembering(mistral)
    other = copy.deepcopy(model)
    nn.init.zeros_(blocks(other)[0].attn.attn.to_out.weight)
    nn.init.zeros_(blocks(other)[1].attn.attn.to_out.weight)
    assert not other(tokens()).logits.equal(model(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stored", "chunked"])
def test_a_given_memory_is_read(kind: str, tmp_path: Path) -> None:
    steps = torch.randn(1, 40, 24)
    if kind == "stored":
        pytest.importorskip("lance")
        notes: Any = memory.open(tmp_path / "notes", dim=24, chunk_size=CHUNK)
        notes.append(steps)
    else:
        notes = ChunkedMemory.from_steps(steps, CHUNK)
    model = remembering(llama)
    before = model(tokens()).logits
    add_stored_memory(model, [0], notes, topk_mems=2, heads=2, dim_head=8)
    assert model(tokens()).logits.equal(before)
    nn.init.normal_(model.model.layers[0].htm_stored.attn.attn.to_out.weight, std=0.5)
    whole = model(tokens()).logits
    assert (whole - before).abs().max() > 0.01
    cache = HTMCache(config=model.config)
    pieces = [model(piece, cache=cache).logits for piece in tokens().split(25, 1)]
    assert_near(torch.cat(pieces, 1), whole, 1e-5)
    assert copy.deepcopy(model)(tokens()).logits.equal(whole)


def again() -> None:
    model = llama()
    add_memory(model, [1], **SIZES)
    add_memory(model, [0, 1], **SIZES)


def ask(**options: Any) -> None:
    model = remembering(llama)
    model(tokens(), **{name: make(model) for name, make in options.items()})


def filled(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    llama()(tokens(), cache=cache)
    return cache


def cropped() -> None:
    model = remembering(llama)
    cache = HTMCache(config=model.config)
    model(tokens(), cache=cache)
    cache.crop(3)


def llava(layers: int = LAYERS) -> Any:
    """Sees pictures through a tower of so many layers, which is not causal."""
    tower = transformers.CLIPVisionConfig(
        hidden_size=DIM, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**COMMON), vision_config=tower, image_token_id=63
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("says_causal", [True, False])
@pytest.mark.parametrize("layers", [1, LAYERS])
def test_the_memory_is_in_the_text_model_whatever_else_there_is(
    layers: int, says_causal: bool
) -> None:
    model = llava(layers)
    if not says_causal:
        for part in model.modules():
            if hasattr(part, "is_causal"):
                del part.is_causal
    add_memory(model, [0, 2], **SIZES)
    names = [name for name, _ in model.named_modules() if name.endswith(".htm")]
    assert names == [f"model.language_model.layers.{layer}.htm" for layer in (0, 2)]


def packed(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_texts_packed_into_a_row_do_not_recall_each_other(seed: int) -> None:
    model = remembering(llama)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (5,), generator=generator).tolist()
    row = tokens(1, sum(lengths))
    given = model(row, position_ids=packed(lengths), use_cache=False).logits
    alone = [model(text, use_cache=False).logits for text in row.split(lengths, 1)]
    assert_near(given, torch.cat(alone, 1), 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_texts_begin_where_positions_fall_back_among_tokens_that_exist(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    positions = packed(lengths)[0]
    expected = torch.zeros(len(positions), dtype=torch.bool)
    expected[torch.tensor(lengths).cumsum(0)[:-1]] = True
    exists = torch.rand(2 * len(positions), generator=generator) < 0.5
    places = torch.randperm(len(exists), generator=generator)[: len(positions)].sort().values
    mask = torch.zeros_like(exists).index_fill(0, places, True)
    spread = torch.randint(9, exists.shape, generator=generator).index_copy(0, places, positions)
    heard: list[Any] = []
    model = remembering(llama)
    (call,) = (
        hook.__self__
        for hook in model.model._forward_pre_hooks.values()
        if hasattr(hook, "__self__")
    )
    model.model.register_forward_hook(lambda *_: heard.append(call.is_first))
    model(
        tokens(1, len(mask)),
        position_ids=spread[None],
        attention_mask=mask[None].long(),
        use_cache=False,
    )
    assert heard[0][0, places].equal(expected) and not heard[0][0, ~mask].any()


def test_masks_of_the_usual_kind_begin_no_other_text() -> None:
    model = remembering(llama)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        given = model(tokens(), attention_mask=mask, position_ids=positions).logits
        alone = model(tokens()[:1, 9:]).logits
    assert_near(given[:1, 9:], alone, 1e-5)


def read_by_another(first: Any, second: Any, rows: int = 2) -> None:
    cache = HTMCache(config=second.config)
    first(tokens(), cache=cache)
    before = copy.deepcopy(cache.memories)
    held = cache.get_seq_length()
    try:
        second(tokens(rows), cache=cache)
    finally:
        assert cache.get_seq_length() == held and cache.memories.keys() == before.keys()


def remembering_by(layers: list[int], **sizes: Any) -> Any:
    model = llama().eval()
    add_memory(model, layers, **{"mem_chunks": 8} | SIZES | sizes)
    return model


def read_in_between() -> None:
    """The memories lack what a model without them read."""
    model, cache = remembering(llama), HTMCache(config=llama().config)
    model(tokens(), cache=cache)
    llama()(tokens(), cache=cache)
    model(tokens(), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: read_by_another(llama(), remembering(llama)), "whose memories are missing"),
        (lambda: read_by_another(remembering_by([0]), remembering(llama)), "memories are missing"),
        (lambda: read_by_another(remembering(llama), remembering_by([0])), "memories are missing"),
        (read_in_between, "got one of 120 tokens .*whose memories are missing"),
        (
            lambda: read_by_another(remembering_by([0]), remembering_by([0], mem_chunk_size=8)),
            "memory of layer 0 to have chunk_size 8, .* got 4",
        ),
        (
            lambda: read_by_another(remembering_by([0]), remembering_by([0], mem_chunks=3)),
            "memory of layer 0 to have chunks 3, .* got 8",
        ),
        (
            lambda: read_by_another(remembering(llama), remembering(llama), rows=1),
            "memory of layer 0 to have batch 1, .* got 2",
        ),
    ],
)
def test_a_cache_with_other_memories_is_refused(wrong: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        wrong()


def mamba() -> Any:
    small = {"hidden_size": DIM, "num_hidden_layers": LAYERS, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=WORDS, **small))


def test_a_model_without_attention_is_refused_before_it_is_changed() -> None:
    model = mamba()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="model: expected one with attention, .*got MambaForCau"):
        add_memory(model, [0], **SIZES)
    assert set(model.state_dict()) == names and not hasattr(model.config, "htm_memory")
    model.generate(tokens(), max_new_tokens=2, do_sample=False)


def seq2seq() -> Any:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=9, **small))


def bert() -> Any:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=9, num_hidden_layers=2, **small)
    )


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: add_memory(llama(), [3]), "layers: expected an integer from 0 to 2, got 3"),
        (lambda: add_memory(llama(), 2), r"layers: expected numbers .* \[2\], got int"),  # pyright: ignore[reportArgumentType]
        (
            lambda: add_memory(nn.Linear(2, 2), [0]),
            "model: expected one of transformers, .* Linear",
        ),  # pyright: ignore[reportArgumentType]
        (lambda: add_memory("gpt2", [0]), "model: expected one of transformers, .* got str"),  # pyright: ignore[reportArgumentType]
        (lambda: load_memory("gpt2", "here"), "model: expected a model with a memory, got str"),  # pyright: ignore[reportArgumentType]
        (again, "layers: expected one memory a layer, got 1 twice"),
        (lambda: add_memory(seq2seq(), [0]), "model: expected a decoder .*got T5ForCond"),
        (lambda: add_memory(bert(), [0]), "model: expected a causal one, .*got BertModel"),
        (lambda: add_stored_memory(llama(), [0], torch.zeros(1, 4, 4)), "memory: expected a mem"),  # pyright: ignore[reportArgumentType]
        (lambda: ask(cache=lambda m: StaticCache(m.config, max_cache_len=80)), "got StaticCache"),
        (
            lambda: ask(cache=filled),
            r"got one of 60 tokens \(DynamicCache\), whose memories are missing",
        ),
        (
            lambda: ask(attention_mask=lambda _: torch.zeros(2, 1, 60, 60)),
            r"attention_mask: expected \[B, T\] that marks padding, .* got \[2, 1, 60, 60\]",
        ),
        (cropped, "tokens_to_remove: expected 0"),
    ],
)
def test_what_is_wrong_is_told(wrong: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        wrong()
