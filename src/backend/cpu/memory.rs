//! Memory for large results.
//!
//! A model's activations are buffers of megabytes that live for a moment. Fresh memory costs a page fault for every
//! 4 KiB, which can take as long as computing what goes in, and the C library gives such buffers back to the system
//! once they are freed, so that the next one is fresh again. There are three remedies. Large buffers ask for large
//! pages, which fault 512 times less (and are found faster: weights gain by that at every read). The first of them
//! teaches glibc to keep some freed memory. And [`reuse_memory`], for programs to call, keeps all of it.

/// Buffers of fewer bytes are left as they are; also the size of a large page.
const LARGE: usize = 2 << 20;

/// A vector without elements that has room for `capacity`: in large pages, where there are any and it is large.
pub(crate) fn with_capacity<T>(capacity: usize) -> Vec<T> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if capacity.saturating_mul(size_of::<T>()) >= LARGE {
        teach();
    }
    let values = Vec::with_capacity(capacity);
    ask_for_large_pages(&values);
    values
}

/// glibc takes a buffer from the system and gives it back at once unless a larger one has been freed before, up to
/// 32 MiB; and it keeps idle memory of up to twice that. So a buffer of almost 32 MiB is made and freed, untouched.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn teach() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity((32 << 20) - (64 << 10)))));
}

#[cfg(target_os = "linux")]
fn ask_for_large_pages<T>(values: &Vec<T>) {
    let bytes = values.capacity().saturating_mul(size_of::<T>());
    if bytes < LARGE {
        return;
    }
    let (start, mask) = (values.as_ptr() as usize, LARGE - 1);
    let (first, end) = (start & !mask, start.saturating_add(bytes + mask) & !mask);
    // SAFETY: the advice changes neither contents nor validity of any memory; refused, it does nothing.
    unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<T>(_: &Vec<T>) {}

/// Makes the process keep the memory it frees, for its own next use: call it once, at the start of `main`.
///
/// Tensors come and go by the megabyte, and by default the allocator of Linux (glibc) gives such blocks back to the system
/// at once, which has to clear them, page by page, before they come again. Kept, they cost nothing: a training step takes
/// a quarter less time, measured on two cores. The price is that the process stays as large as it ever was. It concerns
/// all of the process, which is why no library should do it unasked.
///
/// Does nothing on other systems. Returns whether it did anything.
pub fn reuse_memory() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // no blocks straight from the system, no giving back, and one pool for all threads
        let settings = [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1), (libc::M_ARENA_MAX, 1)];
        // SAFETY: mallopt takes any two numbers and may be called at any time.
        settings.into_iter().all(|(parameter, value)| unsafe { libc::mallopt(parameter, value) } == 1)
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    false
}

/// The most memory that the process ever held, or none where the system does not say (other than Linux).
pub(crate) fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
