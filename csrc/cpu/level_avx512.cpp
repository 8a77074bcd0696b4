#define FASTNCE_LEVEL avx512
#define FASTNCE_STRING_(x) #x
#define FASTNCE_STRING(x) FASTNCE_STRING_(x)
#define FASTNCE_VECTOR_BYTES 64
#define FASTNCE_ROWS 6
#define FASTNCE_VECTORS 4
#include "level.inc"
