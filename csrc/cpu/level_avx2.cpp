// The vector kernels with AVX2 and FMA: 8 lanes.
#if defined(__x86_64__)
#define TORCH_MLP_LEVEL level_avx2
#define TORCH_MLP_LEVEL_NAME "avx2"
#define TORCH_MLP_LANES 8
#define TORCH_MLP_TARGET "avx2,fma"
#include "level.h"
#endif
