//! Pages of a constant that an operator has packed: it lies in a file that ONNX Runtime has mapped, nobody reads it again, and it need not
//! stay resident.

/// Gives back the pages that a constant fills, where they are a file's: whoever reads them after all gets them from the file again. On
/// systems where that cannot be told or done, nothing happens.
pub(super) fn give_back<T>(constant: &[T]) {
    #[cfg(target_os = "linux")]
    linux::give_back(constant.as_ptr() as usize, size_of_val(constant));
    #[cfg(not(target_os = "linux"))]
    let _ = constant;
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    /// Bits of a page in /proc/self/pagemap: it is in memory, it is swapped out, it is a file's.
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;

    #[allow(unsafe_code)]
    pub(super) fn give_back(from: usize, bytes: usize) {
        // SAFETY: it only asks for a number.
        let Ok(page) = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) else {
            return;
        };
        if page == 0 {
            return;
        }
        let (first, end) = (from.div_ceil(page), (from + bytes) / page);
        if first >= end || !pages(first, end - first).is_ok_and(|pages| pages.into_iter().all(keeps_nothing))
        {
            return;
        }
        // SAFETY: the constant is lent to the caller, so its pages stay where they are; nobody writes to it. Each of them that exists is a
        // file's, as was just seen, so that what is read there next is what is there now. An error leaves them as they are.
        unsafe {
            libc::madvise(
                (first * page) as *mut libc::c_void,
                (end - first) * page,
                libc::MADV_DONTNEED,
            );
        }
    }

    /// What the system says of pages.
    fn pages(first: usize, count: usize) -> std::io::Result<Vec<u64>> {
        let mut entries = vec![0; 8 * count];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, 8 * first as u64)?;
        let (entries, _) = entries.as_chunks::<8>();
        Ok(entries.iter().map(|&entry| u64::from_ne_bytes(entry)).collect())
    }

    /// Whether a page holds nothing that is not in a file.
    fn keeps_nothing(page: u64) -> bool {
        page & (PRESENT | SWAPPED) == 0 || page & OF_A_FILE != 0
    }

    #[cfg(test)]
    mod tests {
        use std::io::Write;
        use std::os::fd::AsRawFd;

        use super::{PRESENT, give_back, pages};

        const COUNT: usize = 16;

        fn page() -> usize {
            // SAFETY: as in `give_back`.
            #[allow(unsafe_code)]
            usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap()
        }

        fn resident(from: usize) -> usize {
            let found = pages(from / page(), COUNT).unwrap();
            found.iter().filter(|&entry| entry & PRESENT != 0).count()
        }

        #[test]
        #[allow(unsafe_code)]
        fn pages_of_a_file_go_and_come_again() {
            let size = COUNT * page();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&vec![7; size]).unwrap();
            // SAFETY: a new map, of a file that is as long and that nobody else has.
            let map = unsafe {
                let nowhere = std::ptr::null_mut();
                libc::mmap(
                    nowhere,
                    size,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert_ne!(map, libc::MAP_FAILED);
            // SAFETY: it is as long, and stays.
            let map = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), size) };
            let from = map.as_ptr() as usize;
            assert!(map.iter().all(|&byte| byte == 7));
            assert_eq!(resident(from), COUNT);
            // A page that is not filled stays.
            give_back(from + 1, size - 1);
            assert_eq!(resident(from), 1);
            assert!(map.iter().all(|&byte| byte == 7));
            // What was written is not in the file: all stays.
            map[3 * page()] = 8;
            give_back(from, size);
            assert_eq!(resident(from), COUNT);
            assert_eq!(map[3 * page()], 8);
        }

        #[test]
        fn what_is_no_file_stays() {
            let own = vec![1_u8; (COUNT + 1) * page()];
            give_back(own.as_ptr() as usize, own.len());
            assert!(own.iter().all(|&byte| byte == 1));
        }
    }
}
