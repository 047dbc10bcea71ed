// `recall` on the CPU: what the library exports.
//
// Letters are those of htm_pytorch/shapes.py; X counts (row, query) pairs. The caller checks every
// size and owns every array; nothing here allocates more than scratch for a few rows.

#include "attend.h"
#include "pick.h"
#include "projected.h"
#include "step.h"
#include "window.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define FOR_TYPES(name)                                                                 \
    EXPORT void name##_f32_f32(Call* call) { name<float, float>(*call); }               \
    EXPORT void name##_f32_bf16(Call* call) { name<float, BFloat16>(*call); }           \
    EXPORT void name##_f32_f16(Call* call) { name<float, Float16>(*call); }             \
    EXPORT void name##_f64_f64(Call* call) { name<double, double>(*call); }             \
    EXPORT void name##_f64_f32(Call* call) { name<double, float>(*call); }              \
    EXPORT void name##_f64_bf16(Call* call) { name<double, BFloat16>(*call); }          \
    EXPORT void name##_f64_f16(Call* call) { name<double, Float16>(*call); }

FOR_TYPES(pick)
FOR_TYPES(pick_backward)
FOR_TYPES(attend)
FOR_TYPES(attend_backward)
FOR_TYPES(attend_projected)
FOR_TYPES(attend_projected_backward)
EXPORT void pick_backward_summaries_f32(Call* call) { pick_backward_summaries<float>(*call); }
EXPORT void pick_backward_summaries_f64(Call* call) { pick_backward_summaries<double>(*call); }
EXPORT void attend_backward_steps_f32(Call* call) { attend_backward_steps<float>(*call); }
EXPORT void attend_backward_steps_f64(Call* call) { attend_backward_steps<double>(*call); }
EXPORT void seek_f32(Seek* call) { seek(*call); }
EXPORT void encode_f32(Encoding* call) { encode<float>(*call); }
EXPORT void encode_bf16(Encoding* call) { encode<BFloat16>(*call); }
EXPORT void encode_f16(Encoding* call) { encode<Float16>(*call); }
EXPORT void attend_window_f32(Window* call) { attend_window<float>(*call); }
EXPORT void attend_window_f64(Window* call) { attend_window<double>(*call); }
EXPORT void attend_window_backward_f32(Window* call) { attend_window_backward<float>(*call); }
EXPORT void attend_window_backward_f64(Window* call) { attend_window_backward<double>(*call); }
EXPORT void step_f32(Step* call) { step<float>(*call); }
// The structs that are passed, for the caller to lay out: "Name type field, ...;" each.
EXPORT const char* structs() {
#define SPELLED(type, name) " " #type " " #name ","
    return "Heads" HEADS_FIELDS(SPELLED) ";Codes" CODES_FIELDS(SPELLED) ";Encoding" ENCODING_FIELDS(
               SPELLED) ";Call" CALL_FIELDS(SPELLED) ";Seek" SEEK_FIELDS(SPELLED) ";Norm" NORM_FIELDS(SPELLED)
           ";Affine" AFFINE_FIELDS(SPELLED) ";Step" STEP_FIELDS(SPELLED) ";Window" WINDOW_FIELDS(SPELLED);
}
EXPORT int64_t scratch_peak(int32_t reset) {
    const int64_t most = __atomic_load_n(&most_bytes, __ATOMIC_RELAXED);
    if (reset) __atomic_store_n(&most_bytes, held_bytes, __ATOMIC_RELAXED);
    return most;
}
