// AVX-512: 32 registers of 16 floats. 24 sums, 4 vectors of y and a broadcast of x are 29 of them.
#define FASTNCE_LEVEL avx512
#define FASTNCE_VECTOR_BYTES 64
#define FASTNCE_ROWS 6
#define FASTNCE_VECTORS 4
#include "level.inc"
