"""From a teacher to a student, layer by layer: the distance between their hidden states.

The student and the projection of its states carry a gradient; the teacher is detached inside.
"""

from functools import reduce

import torch
from torch import Tensor

from .checks import check_dims, check_floating, squared


def _promoted(*tensors: Tensor) -> list[Tensor]:
    """All in one dtype, the widest of theirs and float32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def hidden_state_loss(student_hidden: Tensor, teacher_hidden: Tensor, projection: Tensor) -> Tensor:
    """Squared distance between the student's projected hidden state and the teacher's, token by token.

        L_t = (1/D_T) Σ_d ((h_S W)_d − h_{T,d})²

    h are the hidden states of a layer of each, D_T is the width of the teacher's and W a linear map that is
    learnt along with the student and thrown away afterwards.

    Args:
        student_hidden: (..., D_S), in practice (B, T, D_S); carries the gradient 2/D_T (h_S W − h_T) Wᵀ.
        teacher_hidden: (..., D_T); detached.
        projection: W, (D_S, D_T); carries the gradient 2/D_T h_Sᵀ (h_S W − h_T), summed over the tokens.

    Returns:
        Shape (...), ≥ 0, in the widest dtype of the three and float32; 0 where the projected states agree. A
        token with a state that is not finite is NaN, with gradient 0 for both.

    Raises:
        ValueError: shapes that do not fit, D_T = 0, inputs that are not floating point.

    Reference:
        Romero et al. 2015 (FitNets), §2.2; with a linear map: Jiao et al. 2020 (TinyBERT), §3.1.

    Page: docs/losses/hidden_state_loss.md

    >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    >>> hidden_state_loss(student, teacher, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    tensor([3.])
    """
    check_floating(student_hidden=student_hidden, teacher_hidden=teacher_hidden, projection=projection)
    check_dims("projection", projection, 2)
    shape = (*student_hidden.shape[:-1], projection.shape[1])
    if student_hidden.shape[-1:] != projection.shape[:1] or teacher_hidden.shape != shape or not shape[-1]:
        shapes = [tuple(tensor.shape) for tensor in (student_hidden, projection, teacher_hidden)]
        message = "student_hidden {} times projection {} must be as teacher_hidden {}, with D_T ≥ 1"
        raise ValueError(message.format(*shapes))
    student, weights, teacher = _promoted(student_hidden, projection, teacher_hidden.detach())
    sound = student.isfinite().all(-1, keepdim=True) & teacher.isfinite().all(-1, keepdim=True)
    gap = student.masked_fill(~sound, 0.0) @ weights - teacher.masked_fill(~sound, 0.0)
    return squared(gap).mean(dim=-1).masked_fill(~sound.squeeze(-1), torch.nan)
