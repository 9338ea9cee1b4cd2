"""Which of a teacher's outputs are the classes of the dataset, and its module turned to them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stages.cache.identity import weights_digest
from stages.inputs.class_maps import Groups, class_groups, in_identity, mapped_names
from stages.inputs.model_outputs import Adapted, check_kind, check_width, output_order
from stages.inputs.models import Model
from stages.settings import TeacherSettings


@dataclass(frozen=True)
class TeacherOutputs:
    """What is made of a teacher's outputs, as its identity has it.

    order: which output each class is, empty if the same numbers are. pooled: instead, which outputs
    each class has.
    """

    order: tuple[int, ...] = ()
    pooled: Groups = ()

    def adapted(self, model: Model, teacher: TeacherSettings) -> Model:
        """The model with logits of the dataset's classes as its outputs."""
        if not (self.order or self.pooled) and teacher.outputs == "logits":
            return model
        module = Adapted(model.module, teacher.outputs, self.order, self.pooled)
        return replace(model, module=module)


def output_names(model: Model, teacher: TeacherSettings, outputs: int) -> tuple[str, ...]:
    """The names of classes, where images have none of their own: those of the class map, else those
    that the model's outputs come with, else their numbers.
    """
    if teacher.classes not in (None, "auto"):
        return mapped_names(teacher.classes or "")
    if model.output_names is not None and len(model.output_names) == outputs:
        return tuple(names[0] for names in model.output_names)
    return tuple(map(str, range(outputs)))


def weights_of(model: Model) -> str:
    """The digest of a teacher's weights, as its identity has it."""
    return model.digest or weights_digest(model.module.state_dict())


def teacher_outputs(
    model: Model, teacher: TeacherSettings, classes: Sequence[str], rows: Tensor
) -> TeacherOutputs:
    """The outputs of the dataset's classes. rows: what the model returns for two of its images.

    Raises ModelError where classes have no output, or rows are not what `outputs` says.
    """
    source = teacher.weights or model.architecture
    check_kind(model, rows, teacher.outputs)
    if teacher.classes is None:
        order = output_order(model.classes, classes, teacher.class_order, source)
        check_width(model, rows, len(classes))
        return TeacherOutputs(order)
    count = rows.shape[1]
    groups = class_groups(teacher.classes, classes, model.output_names, count, source)
    return TeacherOutputs(*in_identity(groups, count))
