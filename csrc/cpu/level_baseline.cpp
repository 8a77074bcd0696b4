// SSE2 or NEON, which every processor of the architecture has: registers of 4 floats. 8 sums.
#define FASTNCE_LEVEL baseline
#define FASTNCE_VECTOR_BYTES 16
#define FASTNCE_ROWS 4
#define FASTNCE_VECTORS 2
#include "level.inc"
