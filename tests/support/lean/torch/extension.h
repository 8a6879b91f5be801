// What DeepSpeed's kernels use of PyTorch's header of this name, which reads ten times as much.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>
