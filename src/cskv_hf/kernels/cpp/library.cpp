// The kernels for CPUs as operations of torch; ../cpu.py compiles this file and calls them.

#include <torch/library.h>

#include "attend.h"
#include "quantize.h"

TORCH_LIBRARY(cskv_hf, library) {
  library.def(
      "attend(Tensor query, float scale, Tensor exact_keys, Tensor exact_values, Tensor? mask, Tensor[] key_data, "
      "Tensor[] key_ranges, Tensor key_runs, Tensor first_run, Tensor key_B, Tensor key_mean, Tensor positions, "
      "Tensor inv_freq, float scaling, ScalarType dtype, int[] key_sizes, Tensor[] value_data, Tensor[] value_ranges, "
      "Tensor value_runs, Tensor value_B, Tensor value_mean, int[] value_sizes) -> Tensor");
  library.def(
      "quantize(Tensor latents, Tensor runs, int[] sizes, int code_bytes, int num_ranges) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cskv_hf, CPU, library) {
  library.impl("attend", cskv::attend);
  library.impl("quantize", cskv::quantize);
}
