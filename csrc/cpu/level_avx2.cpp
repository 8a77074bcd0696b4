// AVX2 and FMA: 16 registers of 8 floats. 12 sums, 2 vectors of y and a broadcast of x are 15 of them.
#define FASTNCE_LEVEL avx2
#define FASTNCE_VECTOR_BYTES 32
#define FASTNCE_ROWS 6
#define FASTNCE_VECTORS 2
#include "level.inc"
