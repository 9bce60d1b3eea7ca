// Found before the toolkit's header of the same name when kernels are emulated.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
using __nv_bfloat16 = torch::headeronly::BFloat16;
