// What every processor of the architecture has (SSE2, NEON): 4 floats, 8 sums.
#define FASTNCE_LEVEL baseline
#define FASTNCE_VECTOR_BYTES 16
#define FASTNCE_ROWS 4
#define FASTNCE_VECTORS 2
#include "level.inc"
