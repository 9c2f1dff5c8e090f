// How large the structures are that decoder.cpp is given, for library.py to compare with its own.

#include <cstdint>

#include "model.h"

extern "C" __attribute__((visibility("default"))) void asyncscale_structure_sizes(int64_t* sizes) {
  using namespace kernels;
  const int64_t own[] = {sizeof(Layer), sizeof(Model), sizeof(Cache), sizeof(Exchange), sizeof(Step)};
  for (int i = 0; i < 5; i++) sizes[i] = own[i];
}
