#define FASTNCE_LEVEL baseline
#define FASTNCE_STRING_(x) #x
#define FASTNCE_STRING(x) FASTNCE_STRING_(x)
#define FASTNCE_VECTOR_BYTES 16
#define FASTNCE_ROWS 4
#define FASTNCE_VECTORS 2
#include "level.inc"
