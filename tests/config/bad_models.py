"""Bad inputs that show beside a topology, in the configs at hand, or in a recipe script."""

from __future__ import annotations

from bad_input_form import BadInput
from samples import MIXTRAL

# Topology and mesh.
MESHES = [
    BadInput(
        "unknown chip",
        "topology", "v6x-8", "names a chip", "known chips: v4,", "v6e-8",
        ("topology=v6x-8",), mended=("topology=v6e-8",),
    ),
    BadInput(
        "mesh product too small",
        "mesh.fsdp, mesh.tensor", "2 x 2", "must equal the devices per slice", "product 4", "mesh.fsdp=4",
        ("mesh.fsdp=2", "mesh.tensor=2"), mended=("mesh.fsdp=4", "mesh.tensor=2"),
    ),
    BadInput(
        "mesh product does not divide",
        "mesh.data", "3", "must divide the devices per slice", "product 3", "mesh.data=1 or 2 or 4 or 8",
        ("mesh.data=3",), mended=("mesh.data=2",),
    ),
    BadInput(
        "rows of a mesh that cannot be filled are not judged",
        "mesh.data", "3", "must divide the devices per slice", "product 3", "mesh.data=1 or 2 or 4 or 8",
        ("mesh.data=3", "data.batch_rows=32"), mended=("mesh.data=2", "data.batch_rows=32"),
    ),
    BadInput(
        "two open axes",
        "mesh.data, mesh.fsdp", -1, "at most one axis may be -1", "2 are", "-1 for data only",
        ("mesh.data=-1",), mended=("mesh.data=-1", "mesh.fsdp=1"),
    ),
    BadInput(
        "axis of size 0",
        "mesh.tensor", 0, "whole number above 0, or -1", "devices per slice of cpu-8=8", "-1",
        ("mesh.tensor=0",), mended=("mesh.tensor=-1", "mesh.fsdp=2"),
    ),
    BadInput(
        "slices that are not there",
        "mesh.dcn_fsdp", "2", "must divide the slices", "slices of cpu-8=1", "mesh.dcn_fsdp=1",
        ("mesh.dcn_fsdp=2",), mended=("mesh.dcn_fsdp=1",),
    ),
    BadInput(
        "context parallelism",
        "mesh.context", "2", "context parallelism is not yet supported", "supported axes: data,", "1",
        ("mesh.context=2",), mended=("mesh.context=1",),
    ),
    BadInput(
        "expert parallelism by filling",
        "mesh.expert", "-1 (filled: 8)", "must be 1: the model has no experts to split",
        "model_type=llama", "1",
        ("mesh.expert=-1", "mesh.fsdp=1"), mended=("mesh.expert=1", "mesh.fsdp=8"),
    ),
    BadInput(
        "experts that the axis does not divide",
        "mesh.expert", 4, "must divide num_experts", "num_experts=6", "1 or 2",
        (*MIXTRAL, "mesh.expert=4"), mended=(*MIXTRAL, "mesh.expert=2"),
    ),
    BadInput(
        "hidden size that both axes over it do not divide",
        "mesh.fsdp", "-1 (filled: 32)", "must divide hidden_size", "hidden_size=96",
        "1, 2, 4, 8 or 16 with mesh.data=-1",
        (*MIXTRAL, "mesh.expert=2", "topology=cpu-64", "data.batch_rows=64"),
        mended=(
            *(*MIXTRAL, "mesh.expert=2", "topology=cpu-64", "data.batch_rows=64"),
            *("mesh.fsdp=16", "mesh.data=-1"),
        ),
    ),
    BadInput(
        "grouped experts without TPUs",
        "kernels.experts", "grouped", "is a kernel for TPUs", "topology=cpu-8", "auto or plain",
        (*MIXTRAL, "kernels.experts=grouped"), mended=(*MIXTRAL, "kernels.experts=plain"),
    ),
    BadInput(
        "unknown rule table",
        "mesh.rules", "fsdp+tensr", "not a known rule table", "fsdp, fsdp+tensor", "'fsdp+tensor'",
        ("mesh.rules=fsdp+tensr",), mended=("mesh.rules=fsdp+tensor",),
    ),
    BadInput(
        "axis that splits nothing",
        "mesh.tensor", 2, "splits nothing under these rules", "'fsdp'", "mesh.rules=fsdp+tensor",
        ("mesh.rules=fsdp", "mesh.tensor=2"), mended=("mesh.rules=fsdp+tensor", "mesh.tensor=2"),
    ),
    BadInput(
        "indivisible kv heads",
        "mesh.tensor", "8", "must divide num_key_value_heads", "num_key_value_heads=4", "1, 2 or 4",
        ("mesh.tensor=8",), mended=("mesh.tensor=4",),
    ),
    BadInput(
        "indivisible heads",
        "mesh.tensor", "3", "must divide num_attention_heads", "num_attention_heads=8", "1, 2 or 4",
        ("mesh.tensor=3", "topology=cpu-48"), mended=("mesh.tensor=4", "topology=cpu-48"), problems=3,
    ),
    BadInput(
        "indivisible hidden size of a filled axis",
        "mesh.fsdp", "-1 (filled: 20)", "must divide hidden_size", "hidden_size=96",
        "1, 2 or 4 with mesh.data=-1",
        ("topology=cpu-20", "data.batch_rows=40"),
        mended=("topology=cpu-20", "data.batch_rows=40", "mesh.fsdp=4", "mesh.data=-1"),
    ),
    BadInput(
        "rows that do not split over the devices",
        "data.batch_rows", 20, "every device of the batch axes as many rows", "data=1 x fsdp=8", "16 or 24",
        ("data.batch_rows=20",), mended=("data.batch_rows=24",),
    ),
    BadInput(
        "micro-batches that do not split over the devices",
        "data.batch_rows", 48, "every device of the batch axes as many rows", "so 12 rows at a time",
        "32 or 64",
        ("optim.accumulation=4",), mended=("optim.accumulation=4", "data.batch_rows=64"),
    ),
    BadInput(
        "fewer rows than devices",
        "data.batch_rows", 4, "every device of the batch axes as many rows", "so 2 rows at a time", "16",
        ("data.batch_rows=4", "optim.accumulation=2"), mended=("data.batch_rows=16", "optim.accumulation=2"),
    ),
    BadInput(
        "rows that do not split into micro-batches",
        "data.batch_rows", 48, "must be a multiple of optim.accumulation", "optim.accumulation=5", "40 or 80",
        ("optim.accumulation=5",), mended=("optim.accumulation=5", "data.batch_rows=80"),
    ),
    BadInput(
        "torch backend on several devices",
        "topology", "cpu-8", "must be one CPU device", "backend=torch", "cpu-1",
        ("backend=torch",), mended=("backend=torch", "topology=cpu-1"),
    ),
    BadInput(
        "CPU_NUM_DEVICES that is no number",
        "environment variable CPU_NUM_DEVICES", "many", "whole number above 0", "topology=auto", "1",
        ("topology=auto",), environ={"CPU_NUM_DEVICES": "many"},
    ),
]  # fmt: skip

_SMALL_JSON = (
    '{"model_type": "llama", "vocab_size": 1031, "hidden_size": 96, "intermediate_size": 176,'
    ' "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,'
    ' "rope_theta": 20000.0, "max_position_embeddings": 512}'
)

# The model's config and where it is read from.
MODELS = [
    BadInput(
        "no checkpoint to take the architecture from",
        "model.config", "pretrained", "needs a checkpoint", "model.pretrained=none",
        "the path of a config.json",
        ("model.config=pretrained",),
    ),
    BadInput(
        "hub id that is not on this machine",
        "model.config", "pretrained", "needs the checkpoint's config.json at hand", "nor in the hub cache",
        "its fields in the recipe",
        ("model.config=pretrained", "model.pretrained=org/none", "model.tokenizer=pretrained"),
        mended=("model.pretrained=org/none", "model.tokenizer=pretrained"),
    ),
    BadInput(
        "unknown family",
        "model.config.model_type", "lama", "not a known model family", "known: gemma2, ", "'llama'",
        ("model.config.model_type=lama",), mended=("model.config.model_type=llama",),
    ),
    BadInput(
        "unknown architecture",
        "model.config.architectures", "LlamaModel", "not a known architecture", "LlamaForCausalLM",
        "'LlamaForCausalLM'",
        ('model.config.architectures=["LlamaModel"]',),
        mended=('model.config.architectures=["LlamaForCausalLM"]',),
    ),
    BadInput(
        "misspelled field",
        "model.config.num_hiden_layers", 2, "not a field of this architecture", "num_hidden_layers",
        "model.config.num_hidden_layers",
        ("model.config.num_hiden_layers=2",), mended=("model.config.num_hidden_layers=2",),
    ),
    BadInput(
        "field of the wrong type",
        "model.config.intermediate_size", "wide", "must be a whole number", "smallest: 1", "1 or more",
        ("model.config.intermediate_size=wide",), mended=("model.config.intermediate_size=184",),
    ),
    BadInput(
        "quantised checkpoint",
        "model.config.quantization_config", "gptq", "is not supported", "quant_method: gptq", "not quantised",
        ('model.config.quantization_config={"quant_method": "gptq"}',),
        mended=("model.config.quantization_config=null",),
    ),
    BadInput(
        "architecture other than the checkpoint's",
        "model.config.num_hidden_layers", "5", "must equal the checkpoint's", "has num_hidden_layers=3",
        "3, or model.config=pretrained",
        ("model.config.num_hidden_layers=5", "model.pretrained={tmp}/ckpt", "model.tokenizer=pretrained"),
        mended=("model.config=pretrained", "model.pretrained={tmp}/ckpt", "model.tokenizer=pretrained"),
        files={"ckpt/config.json": _SMALL_JSON},
    ),
    BadInput(
        "checkpoint of an unknown family",
        "model.config.model_type", "gpt9", "not a known model family", "config.json of {tmp}/ckpt",
        "a name from",
        ("model.config=pretrained", "model.pretrained={tmp}/ckpt", "model.tokenizer=pretrained"),
        files={"ckpt/config.json": '{"model_type": "gpt9"}'},
    ),
    BadInput(
        "checkpoint folder that is not there",
        "model.pretrained", "{tmp}/none", "must exist", "no folder {tmp}/none", "a hub id",
        ("model.pretrained={tmp}/none", "model.tokenizer=pretrained"),
    ),
    BadInput(
        "checkpoint folder without config.json",
        "model.pretrained", "{tmp}/ckpt", "must hold a config.json", "model.safetensors",
        "a folder with config",
        ("model.pretrained={tmp}/ckpt", "model.tokenizer=pretrained"), files={"ckpt/model.safetensors": ""},
    ),
    BadInput(
        "run instead of one of its steps",
        "model.pretrained", "{tmp}/run", "must hold a config.json", "it holds assets, checkpoints",
        "{tmp}/run/checkpoints",
        ("model.pretrained={tmp}/run", "model.tokenizer=pretrained"),
        mended=("model.pretrained={tmp}/run/checkpoints/7", "model.tokenizer=pretrained"),
        files={"run/checkpoints/7/x": "", "run/assets/config.json": _SMALL_JSON},
    ),
    BadInput(
        "checkpoint that is a file",
        "model.pretrained", "{tmp}/model.safetensors", "must be a folder", "it is a file",
        "a folder with config",
        ("model.pretrained={tmp}/model.safetensors", "model.tokenizer=pretrained"),
        files={"model.safetensors": ""},
    ),
    BadInput(
        "config.json cut short",
        "model.config", "{tmp}/config.json", "must be JSON", "line 1, column", "a config.json that parses",
        ("model.config={tmp}/config.json",), files={"config.json": '{"model_type": "lla'},
    ),
    BadInput(
        "config.json that is a list",
        "model.config", "{tmp}/config.json", "must be a JSON object", "holds a JSON list", '"model_type"',
        ("model.config={tmp}/config.json",), files={"config.json": "[]"},
    ),
    BadInput(
        "config path that is not there",
        "model.config", "{tmp}/none.json", "must exist", "no file {tmp}/none.json",
        "the path of a config.json",
        ("model.config={tmp}/none.json",),
    ),
]  # fmt: skip

# Which weights are trained.
TRAINABLE = [
    BadInput(
        "pattern without a match",
        "model.trainable", "model.layers.*.selfattn.q_proj.weight", "matches no weight of the model",
        "weights: lm_head.weight, model.embed_tokens.weight, model.layers.*.input_layernorm.weight",
        "model.layers.*.self_attn.q_proj.weight (did you mean it?)",
        ("model.trainable=lm_head.weight,model.layers.*.selfattn.q_proj.weight",),
        mended=("model.trainable=lm_head.weight,model.layers.*.self_attn.q_proj.weight",),
    ),
    BadInput(
        "two patterns without a match",
        "model.trainable", "zzz", "matches no weight of the model", "weights: lm_head.weight", "*",
        ("model.trainable=zzz,lm_haed.weight",), mended=("model.trainable=*",), problems=2,
    ),
    BadInput(
        "head that is tied",
        "model.trainable", "lm_head.*", "must match a weight of its own",
        "lm_head.weight is tied to model.embed_tokens.weight", "model.embed_tokens.weight",
        ("model.config.tie_word_embeddings=true", "model.trainable=lm_head.*"),
        mended=("model.config.tie_word_embeddings=true", "model.trainable=model.embed_tokens.weight"),
    ),
]  # fmt: skip

_READ = ("model.tokenizer=pretrained", "model.pretrained=org/none")

# Added tokens and chat templates.
TOKENS = [
    BadInput(
        "token named twice",
        "model.add_tokens", "<|a|>,<|b|>,<|a|>", "must name each token once", "'<|a|>' among them",
        "<|a|>,<|b|>",
        ("model.add_tokens=<|a|>,<|b|>,<|a|>",), mended=("model.add_tokens=<|a|>,<|b|>",),
    ),
    BadInput(
        "tokens for a tokenizer that is not on this machine",
        "model.add_tokens", "<|a|>", "needs the tokenizer's tokenizer.json at hand",
        "none in model.pretrained=org/none on this machine", "the folder of a tokenizer",
        (*_READ, "model.add_tokens=<|a|>"), mended=_READ,
    ),
    BadInput(
        "template that adds tokens to it",
        "model.add_tokens", "<|im_start|>,<|im_end|>", "needs the tokenizer's tokenizer.json at hand",
        "none in model.pretrained=org/none on this machine", "no tokens that are added",
        (*_READ, "model.chat_template=chatml"), mended=(*_READ, "model.chat_template=turns"),
    ),
    BadInput(
        "damaged tokenizer.json",
        "model.tokenizer", "{tmp}", "must hold a tokenizer.json as usual", "KeyError 'model'",
        "an intact copy",
        ("model.tokenizer={tmp}", "model.add_tokens=<|a|>"), files={"tokenizer.json": "{}"},
    ),
    BadInput(
        "unknown chat template",
        "model.chat_template", "chatlm", "is not a known chat template",
        "known: FILE.jinja, chatml, own, turns", "'chatml' (did you mean it?)",
        ("model.chat_template=chatlm",), mended=("model.chat_template=chatml",),
    ),
    BadInput(
        "template that is not there",
        "model.chat_template", "{tmp}/none.jinja", "must be a file that can be read", "No such file",
        "the path of a .jinja file, or chatml, turns",
        ("model.chat_template={tmp}/none.jinja",), mended=("model.chat_template=turns",),
    ),
    BadInput(
        "empty template",
        "model.chat_template", "{tmp}/empty.jinja", "must say something", "the file is empty",
        "chatml, turns",
        ("model.chat_template={tmp}/empty.jinja",), files={"empty.jinja": " \n"},
    ),
    BadInput(
        "vocabulary with no room for a tokenizer and the tokens",
        "model.config.vocab_size", 260, "is too small for a byte-level tokenizer", "256 bytes and 5 special",
        "261 or more",
        ("model.config.vocab_size=260", "model.chat_template=chatml"),
        mended=("model.config.vocab_size=261", "model.chat_template=chatml"),
    ),
]  # fmt: skip

# Adapters.
LORA = [
    BadInput(
        "rank below 0",
        "lora.rank", "-1", "must be at least 0", "smallest: 0", "0 or more",
        ("lora.rank=-1",), mended=("lora.rank=0",),
    ),
    BadInput(
        "alpha of 0",
        "lora.alpha", "0", "must be above 0", "must exceed: 0", "16",
        ("lora.rank=4", "lora.alpha=0"), mended=("lora.rank=4", "lora.alpha=16"),
    ),
    BadInput(
        "rank above a side",
        "lora.rank", 64, "must not exceed the smaller side of an adapted matrix",
        "model.layers.0.self_attn.k_proj.weight is 48 x 96", "48 or less",
        ("lora.rank=64",), mended=("lora.rank=48",),
    ),
    BadInput(
        "misspelled target",
        "lora.targets", "qproj", "means no projection that can have an adapter",
        "dims: embed, heads, kv_heads, mlp; modules: down_proj, gate_proj, k_proj, o_proj,",
        "q_proj (did you mean it?)",
        ("lora.rank=4", "lora.targets=qproj,heads"), mended=("lora.rank=4", "lora.targets=q_proj,heads"),
    ),
    BadInput(
        "target outside of the layers",
        "lora.targets", "vocab", "means no projection that can have an adapter", "dims: embed, heads,",
        "heads,kv_heads,mlp",
        ("lora.rank=4", "lora.targets=vocab"), mended=("lora.rank=4", "lora.targets=heads,kv_heads,mlp"),
    ),
    BadInput(
        "experts as targets",
        "lora.targets", "mlp", "means no projection that can have an adapter", "experts get no adapters",
        "heads,kv_heads",
        (*MIXTRAL, "lora.rank=4"), mended=(*MIXTRAL, "lora.rank=4", "lora.targets=heads,kv_heads"),
    ),
    BadInput(
        "trained weights beside adapters",
        "model.trainable", "lm_head.weight", "must stay * beside adapters", "lora.rank=4",
        "*, or lora.rank=0",
        ("lora.rank=4", "model.trainable=lm_head.weight"), mended=("lora.rank=4", "model.trainable=*"),
    ),
    BadInput(
        "adapter of random weights",
        "export.lora", "adapter", "needs a model folder", "model.pretrained=none", "merged, or",
        ("lora.rank=4", "export.lora=adapter"), mended=("lora.rank=4", "export.lora=merged"),
    ),
]  # fmt: skip

_HEADER = "from tptrain.config import *\n"

# Recipe scripts.
SCRIPTS = [
    BadInput(
        "script without RECIPE",
        "recipe", "{tmp}/recipe.py", "must define RECIPE", "recipes in it: MINE", "RECIPE = Recipe(...)",
        script=_HEADER + 'MINE = Recipe(name="a")\n',
    ),
    BadInput(
        "RECIPE of another type",
        "recipe", "{tmp}/recipe.py", "must define RECIPE as a Recipe", "RECIPE is a dict",
        "RECIPE = Recipe(...)",
        script='RECIPE = {"name": "a"}\n',
    ),
    BadInput(
        "script that raises",
        "recipe", "{tmp}/recipe.py", "stopped with NameError: name 'Recpe'", "recipe.py:2: RECIPE = Recpe()",
        "a script that runs",
        script=_HEADER + "RECIPE = Recpe()\n",
    ),
    BadInput(
        "script that does not parse",
        "recipe", "{tmp}/recipe.py", "stopped with SyntaxError", "recipe.py:2", "a script that runs",
        script=_HEADER + "RECIPE = Recipe(name=\n",
    ),
    BadInput(
        "script with a missing import",
        "recipe", "{tmp}/recipe.py", "No module named 'no_such_module'", "recipe.py:1: import no_such_module",
        "a script that runs",
        script="import no_such_module\n",
    ),
    BadInput(
        "script with a wrong value",
        "data.seq_len", 1, "must be at least 2", "recipe.py:2", "2 or more",
        script=_HEADER + 'RECIPE = Recipe(name="a", data=DataSection(seq_len=1))\n',
    ),
    BadInput(
        "script with an unknown setting",
        "mesh.fdsp", 4, "not a known setting", "settings of mesh: data, fsdp", "mesh.fsdp (did you mean it?)",
        script=_HEADER + 'RECIPE = Recipe(name="a", mesh=MeshSection(fdsp=4))\n',
    ),
    BadInput(
        "script without a name for its recipe",
        "name", "none", "is required", "type: text", "name=...",
        script=_HEADER + "RECIPE = Recipe()\n",
    ),
    BadInput(
        "script with a section of the wrong type",
        "mesh", 4, "must be a MeshSection", "type: MeshSection", "mesh=MeshSection(...)",
        script=_HEADER + 'RECIPE = Recipe(name="a", mesh=4)\n',
    ),
]  # fmt: skip
