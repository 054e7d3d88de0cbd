"""The names that the README's code takes as given."""

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

advantage: Tensor
head_rows: Tensor
targets: Tensor
class_weight: Tensor
balance_logit: Tensor
teacher_indices: Tensor
teacher_probs: Tensor
teacher_hidden: Tensor
teacher_head: nn.Linear
mask: Tensor
model: PreTrainedModel
arguments: TrainingArguments
dataset: Dataset
batch: dict[str, Tensor]
