"""Reading and editing the outputs of blocks during a forward pass.

Sites stand before the blocks of a shallow copy of a model, and can also skip blocks. Hooks leave the model as it is,
and are the reference that sites are checked with.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from workers.models.packing import Packing

EditOutput = Callable[[int, Tensor], Tensor]
"""What becomes of the output [V, T, D] of a block."""


@dataclass
class ForwardPass:
    """What the sites do during one forward pass.

    Attributes:
        record: blocks whose output is put into `recorded`.
        stop_after: the last block that runs.
        inject: a block, and the states that take the place of its output; blocks up to it are skipped.
        edit: changes the outputs of `edit_layers`.
        packing: the pass runs on packed texts. reads_only: the block that then runs at read positions only.
    """

    record: Collection[int] = ()
    stop_after: int | None = None
    inject: tuple[int, Tensor] | None = None
    edit: EditOutput | None = None
    edit_layers: Collection[int] = ()
    recorded: dict[int, Tensor] = field(default_factory=dict)
    packing: Packing | None = None
    reads_only: int | None = None


class PassStopped(BaseException):
    """A packed pass has recorded everything it was asked for. Not an error."""


class BlockSite(nn.Module):
    """Stands in for block `index`; attributes that a model reads from its blocks are the block's.

    Args:
        current_pass: gives the pass that runs now.
    """

    def __init__(self, index: int, block: nn.Module, current_pass: Callable[[], ForwardPass]) -> None:
        super().__init__()
        self.index = index
        self.block = block
        self.current_pass = current_pass

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = self.current_pass()
        if now.inject is not None and self.index <= now.inject[0]:
            return now.inject[1] if self.index == now.inject[0] else hidden
        if now.stop_after is not None and self.index > now.stop_after:
            return hidden
        if now.packing is not None and self.index == now.reads_only:
            output: Tensor = now.packing.run_at_reads(self.block, hidden, *args, **kwargs)
        else:
            output = self.block(hidden, *args, **kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(f"block {self.index} returns {type(output).__name__}, not a tensor")
        if now.edit is not None and self.index in now.edit_layers:
            output = now.edit(self.index, output)
        if self.index in now.record:
            now.recorded[self.index] = output
        if now.packing is not None and self.index == now.stop_after:
            raise PassStopped
        return output


def with_sites(
    model: nn.Module, path: str, blocks: Iterable[nn.Module], current_pass: Callable[[], ForwardPass]
) -> nn.Module:
    """A shallow copy of a model that shares every weight, with sites before `blocks` as its block list at `path`.

    The list keeps its length, so models that look things up by block index (Qwen2's layer types) stay right.
    """
    sites = nn.ModuleList(BlockSite(index, block, current_pass) for index, block in enumerate(blocks))
    return _with_submodule(model, path.split("."), sites)


def _with_submodule(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    if not path:
        return replacement
    clone = copy.copy(module)
    child = _with_submodule(module.get_submodule(path[0]), path[1:], replacement)
    clone.__dict__["_modules"] = {**module._modules, path[0]: child}
    return clone


@contextmanager
def output_hooks(modules: Mapping[int, nn.Module], edit: EditOutput) -> Iterator[None]:
    """Inside, the output of each module is what `edit` makes of it. Keys are block indices."""

    def hook(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def apply(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(layer, output[0]), *output[1:])
            return edit(layer, output)

        return apply

    handles = [module.register_forward_hook(hook(layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
