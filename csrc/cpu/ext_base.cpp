// The CPU kernels for the "base" instruction set; setup.py gives the compiler its flags.
#include "extension.h"
