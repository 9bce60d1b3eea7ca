// For functions that must become a part of their callers: those of hot loops, whose vectors would
// otherwise cross a call.
#pragma once

#define PYSEG_INLINE inline __attribute__((always_inline))
