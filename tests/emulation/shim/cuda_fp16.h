// Found before the toolkit's header of the same name when kernels are emulated.
#pragma once
#include <torch/headeronly/util/Half.h>
using __half = torch::headeronly::Half;
