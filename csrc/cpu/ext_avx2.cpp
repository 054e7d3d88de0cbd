// The CPU kernels for the "avx2" instruction set; setup.py gives the compiler its flags.
#include "extension.h"
