// See Metal/Metal.h.

#include <Metal/Metal.h>
