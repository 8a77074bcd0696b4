#define FASTNCE_LEVEL avx2
#define FASTNCE_STRING_(x) #x
#define FASTNCE_STRING(x) FASTNCE_STRING_(x)
#define FASTNCE_VECTOR_BYTES 32
#define FASTNCE_ROWS 6
#define FASTNCE_VECTORS 2
#include "level.inc"
