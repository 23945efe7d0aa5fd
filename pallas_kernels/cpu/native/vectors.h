// The vector types of one instruction set of LANES floats, and what all of them do alike.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Uints __attribute__((vector_size(4 * LANES)));

template <class T>
INLINE T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
INLINE void store(void* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

INLINE Ints all(int32_t v) { return Ints{} + v; }
// By its bits: adding the number to zeros would be an instruction.
INLINE Floats all(float v) { return (Floats)all(load<int32_t>(&v)); }
INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
