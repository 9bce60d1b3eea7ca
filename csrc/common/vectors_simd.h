// Vectors of the compiler: of N numbers, or of a register of the level.
//
// `<op>_simd.cpp` includes this after level.h, inside the namespace of its level: vector types are
// lowered to the target in force where they are written.

template <class T>
constexpr int64_t kLanes = PYSEG_REGISTER / sizeof(T);

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T memory __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N = kLanes<T>>
using Vector = typename VectorOf<T, N>::type;

// N = 0: of a register.
template <int N = 0, class T>
PYSEG_INLINE Vector<T, N ? N : kLanes<T>> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T, N ? N : kLanes<T>>::memory*>(from);
}
template <int N = 0, class T>
PYSEG_INLINE void store(T* to, Vector<T, N ? N : kLanes<T>> value) {
  *reinterpret_cast<typename VectorOf<T, N ? N : kLanes<T>>::memory*>(to) = value;
}
template <int N = 0, class T>
PYSEG_INLINE Vector<T, N ? N : kLanes<T>> broadcast(T x) {
  return x - Vector<T, N ? N : kLanes<T>>{};
}
