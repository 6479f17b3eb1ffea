// The vector kernels with what every processor of the architecture has: 4 lanes, SSE2 on x86-64, NEON on arm64.
#define TORCH_MLP_LEVEL level_default
#define TORCH_MLP_LEVEL_NAME "default"
#define TORCH_MLP_LANES 4
#include "level.h"
