"""TRL's DPOTrainer and GRPOTrainer on the weights and the batch of lab/bench_gpu.py.

Its model is transformers' LLaVA with our tensors, not copies; its LoRA is PEFT's, on the same
layers, the projector frozen. A collator hands it the very rows of our batch, as its own collator
would pad them: [prompt | chosen] and [prompt | rejected], an image each. GRPOTrainer draws its
answers itself, to prompts of as many words and a picture of noise; an answer has as many tokens as
ours, and its reward is random.
"""

import contextlib
import sys
import time

import torch
import transformers

from lora import LORA_TARGETS


def hub_model(model):
    """An MLLM -> transformers' LLaVA or LLaVA-NeXT, which shares its frozen tensors."""
    name, tiling = "Llava", {}
    if model.anyres:
        name, tiling = "LlavaNext", {"image_grid_pinpoints": list(model.anyres.pinpoints)}
    config = getattr(transformers, f"{name}Config")(
        vision_config=model.vision.config.to_dict(),
        text_config=model.llm.config.to_dict(),
        image_token_index=model.image_token_id,
        vision_feature_layer=model.feature_layer,
        vision_feature_select_strategy="full" if model.keep_cls else "default",
        **tiling,
    )
    with torch.device("meta"):
        hub = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    projector = (model.initial_projector or [model.projector])[0]
    parts = {
        "model.vision_tower": model.vision,
        "model.multi_modal_projector": projector,
        "model.language_model": model.llm.base_model,
        "lm_head": model.llm.get_output_embeddings(),
    }
    tensors = {
        f"{part}.{n.replace('.base.', '.')}": p.detach()
        for part, module in parts.items()
        for n, p in module.named_parameters()
        if ".lora_" not in n
    }
    if model.anyres:
        tensors["model.image_newline"] = model.image_newline.detach()
    hub.load_state_dict(tensors, assign=True)
    # what no state dict holds: positions of the tower, frequencies of the rotation
    hub.model.vision_tower.embeddings.position_ids = model.vision.embeddings.position_ids
    hub.model.language_model.rotary_emb = model.llm.base_model.rotary_emb
    return hub.requires_grad_(False)


def padded(prompts, answers, pixels, image_sizes):
    """Rows of unequal lengths as TRL's collator makes them: chosen first, padded on the right."""
    rows = [torch.cat([p, a[k]]) for k in (0, 1) for p, a in zip(prompts, answers)]
    masks = [
        (torch.arange(len(p) + len(a[k])) >= len(p)).long()
        for k in (0, 1)
        for p, a in zip(prompts, answers)
    ]
    pad = lambda parts: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)  # noqa: E731
    batch = {
        "input_ids": pad(rows),  # (2B, L)
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "completion_mask": pad(masks),
        "pixel_values": torch.cat([pixels] * 2),
    }
    if image_sizes is not None:
        n = len(prompts)
        batch["pixel_values"] = torch.cat([pixels.unflatten(0, (n, -1))] * 2)  # (2B, tiles, ...)
        batch["image_sizes"] = image_sizes.repeat(2, 1)
    return batch


class Watch(transformers.TrainerCallback):
    """Notes the seconds of each step, from a batch in hand to the optimizer's step done, as ours."""

    def __init__(self, seconds, device):
        self.seconds, self.begin = seconds, 0.0
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def on_step_begin(self, *_, **__):
        """Note the time."""
        self.synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Note how long it took."""
        self.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)


def steps(hub, batch, rank, lr, beta, checkpointing, n_steps, device, folder):
    """Train on the same batch n_steps times.

    -> seconds of each step, and the mean log-probs (chosen, rejected) that step 0 logs.
    """
    import datasets
    import peft
    import trl
    from tokenizers import Tokenizer, models

    seconds = []
    # DPOTrainer asks for a processor; nothing is tokenised with it
    backend = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<pad>"
    )
    processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokenizer)
    n = len(batch["input_ids"]) // 2
    config = trl.DPOConfig(
        str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=n,
        learning_rate=lr,
        beta=beta,
        bf16=True,
        max_length=None,  # at its default, 1024, LLaVA-NeXT's image tokens would be cut
        gradient_checkpointing=checkpointing,
        logging_first_step=True,
        save_strategy="no",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        hub,
        args=config,
        callbacks=[Watch(seconds, device)],
        data_collator=lambda _: dict(batch),
        train_dataset=datasets.Dataset.from_dict({"images": list(range(n))}),
        processing_class=processor,
        peft_config=peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS)})",
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    first = trainer.state.log_history[0]
    return seconds, (first["logps/chosen"], first["logps/rejected"])


def processor_of(hub):
    """A processor for random words: a token a word, and the image token expanded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    image, vision = hub.config.image_token_index, hub.config.vision_config
    ids = {f"w{i}": i for i in range(image)} | {"<image>": image}
    backend = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="w0",
        eos_token="w1",
        additional_special_tokens=["<image>"],
    )
    side = vision.image_size
    picture = "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=hub.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template="{% for part in messages[0]['content'] %}" + picture + "{% endfor %}",
    )


def grpo_steps(hub, n, G, new, text, rank, lr, checkpointing, n_steps, device, folder):
    """n_steps iterations over n prompts of `text` words, G answers of `new` tokens to each.

    -> seconds of each.
    """
    import datasets
    import peft
    import trl
    from PIL import Image

    seconds, side, image = [], hub.config.vision_config.image_size, hub.config.image_token_index
    words = torch.randint(3, image, (n, text)).tolist()
    rows = {
        "prompt": [
            [{"role": "user", "content": " ".join(f"w{i}" for i in line)}] for line in words
        ],
        "image": [Image.effect_noise((side, side), 80).convert("RGB") for _ in range(n)],
    }
    config = trl.GRPOConfig(
        str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=G,
        gradient_accumulation_steps=n,
        num_generations=G,
        max_completion_length=new,
        generation_kwargs={"min_new_tokens": new},
        loss_type="grpo",
        learning_rate=lr,
        bf16=True,
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        hub,
        reward_funcs=lambda completions, **_: torch.rand(len(completions)).tolist(),
        args=config,
        callbacks=[Watch(seconds, device)],
        train_dataset=datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()),
        processing_class=processor_of(hub),
        peft_config=peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS)})",
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    drawn = [entry["completions/mean_length"] for entry in trainer.state.log_history[:-1]]
    if drawn != [new] * n_steps:
        raise RuntimeError(f"TRL drew answers of {drawn} tokens")
    return seconds
