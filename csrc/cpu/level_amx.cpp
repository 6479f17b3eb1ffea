// The vector kernels with AVX-512, its products of pairs of bfloat16, and Intel's matrix unit: 16 lanes.
#if defined(__x86_64__)
#define TORCH_MLP_LEVEL level_amx
#define TORCH_MLP_LEVEL_NAME "amx"
#define TORCH_MLP_LANES 16
#define TORCH_MLP_HAS_BFLOAT16_DOTS
#define TORCH_MLP_HAS_AMX
#define TORCH_MLP_TARGET "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#include "level.h"
#endif
