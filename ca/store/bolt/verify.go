package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"os"
	"strconv"

	"github.com/signet-id/signet/ca/store"
)

// A file is verified by reading bbolt's pages here, before bbolt itself sees it: bbolt trusts its pages, and answers a
// damaged one with a panic (in part from goroutines of its own, where nothing can catch it) or with an endless loop.
//
// The layout is that of bbolt's format version 2: pages of pageSize bytes with a header of 16 (id, flags, count,
// overflow); pages 0 and 1 are meta pages, of which the one with the higher transaction number counts; branch and leaf
// pages begin with their elements, which say where key and value are. Numbers are in the byte order of the machine.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader  = 16
	elementSize = 16

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10

	elementBucket = 0x01 // on a leaf element: the value is a bucket

	noFreelist = math.MaxUint64

	// maxDepth and maxPageBytes are far beyond what this store can make.
	maxDepth     = 32
	maxPageBytes = 16 << 20
)

var native = binary.NativeEndian

// inspect reads the file at path, without changing it, and returns its epoch and state if everything that can be reached
// in it is intact. Errors: store.ErrCorrupt, ErrNewerFormat and those of the file system.
func inspect(path string) (epoch string, st state, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", state{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", state{}, err
	}
	if !info.Mode().IsRegular() {
		return "", state{}, fmt.Errorf("%w: it is not a regular file", store.ErrCorrupt)
	}
	return verify(f, info.Size())
}

func verify(r io.ReaderAt, size int64) (epoch string, st state, err error) {
	p, root, err := openPages(r, size)
	if err != nil {
		return "", state{}, err
	}
	buckets := map[string][]byte{}
	err = p.walk(root, func(flags uint32, key, value []byte) error {
		if flags != elementBucket {
			return fmt.Errorf("%w: %.40q is not a bucket", store.ErrCorrupt, key)
		}
		buckets[string(key)] = bytes.Clone(value)
		return nil
	})
	if err != nil {
		return "", state{}, err
	}
	meta := map[string][]byte{}
	err = p.walkBucket(buckets, metaBucket, func(key, value []byte) error {
		meta[string(key)] = bytes.Clone(value)
		return nil
	})
	// A newer version may have changed everything else: its number comes first.
	if ferr := checkFormat(meta[string(formatKey)], err); ferr != nil {
		return "", state{}, ferr
	}
	epoch = string(meta[string(epochKey)])
	if epoch == "" {
		return "", state{}, fmt.Errorf("%w: it has no epoch", store.ErrCorrupt)
	}
	if st, err = parseState(meta[string(stateKey)]); err != nil {
		return "", state{}, err
	}
	got := state{revision: st.revision}
	err = p.walkBucket(buckets, itemBucket, func(key, value []byte) error {
		it, sum, err := parseRecord(string(key), value)
		if err == nil && it.Modified > st.revision {
			err = fmt.Errorf("%w: key %q is from revision %d, the newest is %d", store.ErrCorrupt, key, it.Modified, st.revision)
		}
		got.add(sum)
		return err
	})
	if err != nil {
		return "", state{}, err
	}
	if got != st {
		return "", state{}, fmt.Errorf("%w: it holds %d items where it should hold %d, or others than those last written", store.ErrCorrupt, got.count, st.count)
	}
	return epoch, st, p.checkFreelist()
}

// checkFormat judges the format version. walkErr is what ended the search for it.
func checkFormat(value []byte, walkErr error) error {
	if walkErr != nil && value == nil {
		return walkErr
	}
	version, err := strconv.Atoi(string(value))
	switch {
	case err != nil || version < 1:
		return fmt.Errorf("%w: %.20q is not a format version", store.ErrCorrupt, value)
	case version > formatVersion:
		return fmt.Errorf("%w: it has format %d, this program knows up to %d (run the newer signet again, or restore a backup made before the upgrade)", ErrNewerFormat, version, formatVersion)
	}
	return walkErr
}

// pages reads the pages of one file, each at most once.
type pages struct {
	r        io.ReaderAt
	end      uint64 // the first page number never used
	freelist uint64
	seen     []bool
}

// openPages reads the two meta pages and returns the page of the root bucket.
//
// Both have to be intact. bbolt would go on with the older one, but a meta page fits into one sector and disks write
// sectors whole: a crash leaves it old or new, and one that is neither is damage. Going on with the older state would undo
// a commit that was acknowledged, such as a ban.
func openPages(r io.ReaderAt, size int64) (*pages, uint64, error) {
	var newest []byte
	for i := range uint64(2) {
		page := make([]byte, pageSize)
		if _, err := r.ReadAt(page, int64(i)*pageSize); err != nil {
			if errors.Is(err, io.EOF) {
				return nil, 0, fmt.Errorf("%w: it has %d bytes, less than its first two pages", store.ErrCorrupt, size)
			}
			return nil, 0, err
		}
		m := page[pageHeader : pageHeader+64]
		sum := fnv.New64a()
		sum.Write(m[:56])
		switch {
		case native.Uint64(page) != i || native.Uint16(page[8:]) != flagMeta,
			native.Uint32(m) != boltMagic, native.Uint64(m[56:]) != sum.Sum64():
			return nil, 0, fmt.Errorf("%w: its meta page %d does not match its checksum", store.ErrCorrupt, i)
		case native.Uint32(m[4:]) != boltVersion:
			return nil, 0, fmt.Errorf("%w: bbolt's format is %d, this program knows %d", ErrNewerFormat, native.Uint32(m[4:]), boltVersion)
		case native.Uint32(m[8:]) != pageSize:
			return nil, 0, fmt.Errorf("%w: its page size is %d, never used here", store.ErrCorrupt, native.Uint32(m[8:]))
		}
		if newest == nil || native.Uint64(m[48:]) > native.Uint64(newest[48:]) {
			newest = m
		}
	}
	p := &pages{r: r, freelist: native.Uint64(newest[32:]), end: native.Uint64(newest[40:])}
	if p.end > uint64(size)/pageSize {
		return nil, 0, fmt.Errorf("%w: it has %d bytes and should have %d pages of %d, the rest was cut off", store.ErrCorrupt, size, p.end, pageSize)
	}
	p.seen = make([]bool, p.end)
	return p, native.Uint64(newest[16:]), nil
}

// page reads a page with its overflow.
func (p *pages) page(id uint64) ([]byte, error) {
	if id < 2 || id >= p.end {
		return nil, fmt.Errorf("%w: a link to page %d, which does not exist", store.ErrCorrupt, id)
	}
	if p.seen[id] {
		return nil, fmt.Errorf("%w: two links to page %d", store.ErrCorrupt, id)
	}
	buf := make([]byte, pageSize)
	if _, err := p.r.ReadAt(buf, int64(id)*pageSize); err != nil {
		return nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	n := uint64(native.Uint32(buf[12:])) + 1
	if native.Uint64(buf) != id || n > p.end-id || n > maxPageBytes/pageSize {
		return nil, fmt.Errorf("%w: page %d is not what it should be", store.ErrCorrupt, id)
	}
	for i := id; i < id+n; i++ {
		if p.seen[i] {
			return nil, fmt.Errorf("%w: pages overlap at page %d", store.ErrCorrupt, i)
		}
		p.seen[i] = true
	}
	if n > 1 {
		rest := make([]byte, n*pageSize)
		copy(rest, buf)
		if _, err := p.r.ReadAt(rest[pageSize:], int64(id+1)*pageSize); err != nil {
			return nil, fmt.Errorf("reading page %d: %w", id+1, err)
		}
		buf = rest
	}
	return buf, nil
}

// span is the range of keys that may occur below a link: at least low, and less than high unless that is nil.
type span struct{ low, high []byte }

// walk calls f for each element of the tree under the page, in order of the keys, which it checks.
func (p *pages) walk(root uint64, f func(flags uint32, key, value []byte) error) error {
	w := walker{pages: p, f: f}
	return w.tree(root, span{}, 0)
}

// walkBucket is walk for the bucket of a name, which holds no buckets itself.
func (p *pages) walkBucket(buckets map[string][]byte, name []byte, f func(key, value []byte) error) error {
	header := buckets[string(name)]
	if len(header) < 16 {
		return fmt.Errorf("%w: its bucket %q is missing", store.ErrCorrupt, name)
	}
	w := walker{pages: p, f: func(flags uint32, key, value []byte) error {
		if flags != 0 {
			return fmt.Errorf("%w: key %.40q in bucket %q is not an item", store.ErrCorrupt, key, name)
		}
		return f(key, value)
	}}
	if root := native.Uint64(header); root != 0 {
		return w.tree(root, span{}, 0)
	}
	// A small bucket is a leaf page inside the value.
	page := header[16:]
	if len(page) < pageHeader || native.Uint16(page[8:]) != flagLeaf {
		return fmt.Errorf("%w: its bucket %q is not a leaf page", store.ErrCorrupt, name)
	}
	return w.leaf(page, span{})
}

type walker struct {
	*pages
	f    func(flags uint32, key, value []byte) error
	last []byte // the last key
	any  bool
}

func (w *walker) tree(id uint64, s span, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%w: its tree is deeper than %d", store.ErrCorrupt, maxDepth)
	}
	page, err := w.page(id)
	if err != nil {
		return err
	}
	switch native.Uint16(page[8:]) {
	case flagLeaf:
		err = w.leaf(page, s)
	case flagBranch:
		err = w.branch(page, s, depth)
	default:
		err = fmt.Errorf("%w: it is neither branch nor leaf", store.ErrCorrupt)
	}
	if err != nil && depth == 0 {
		return fmt.Errorf("tree at page %d: %w", id, err)
	}
	return err
}

func (w *walker) branch(page []byte, s span, depth int) error {
	count := int(native.Uint16(page[10:]))
	if count == 0 {
		return fmt.Errorf("%w: a branch page is empty", store.ErrCorrupt)
	}
	key := func(i int) ([]byte, error) {
		if i == count {
			return s.high, nil
		}
		at, e, err := element(page, i)
		if err != nil {
			return nil, err
		}
		return cut(page, at, native.Uint32(e), 0, native.Uint32(e[4:]))
	}
	low, err := key(0)
	if err != nil {
		return err
	}
	for i := range count {
		high, err := key(i + 1)
		if err != nil {
			return err
		}
		_, e, _ := element(page, i) // key(i) has looked at it
		if err := w.tree(native.Uint64(e[8:]), span{low, high}, depth+1); err != nil {
			return err
		}
		low = high
	}
	return nil
}

func (w *walker) leaf(page []byte, s span) error {
	for i := range int(native.Uint16(page[10:])) {
		at, e, err := element(page, i)
		if err != nil {
			return err
		}
		pos, ksize, vsize := native.Uint32(e[4:]), native.Uint32(e[8:]), native.Uint32(e[12:])
		key, err := cut(page, at, pos, 0, ksize)
		if err != nil {
			return err
		}
		value, err := cut(page, at, pos, ksize, vsize)
		if err != nil {
			return err
		}
		if w.any && bytes.Compare(key, w.last) <= 0 || bytes.Compare(key, s.low) < 0 || s.high != nil && bytes.Compare(key, s.high) >= 0 {
			return fmt.Errorf("%w: key %.40q is out of order", store.ErrCorrupt, key)
		}
		w.any = true
		w.last = append(w.last[:0], key...)
		if err := w.f(native.Uint32(e), key, value); err != nil {
			return err
		}
	}
	return nil
}

// element returns element i of a page and where it begins.
func element(page []byte, i int) (at int, e []byte, err error) {
	at = pageHeader + i*elementSize
	if at+elementSize > len(page) {
		return 0, nil, fmt.Errorf("%w: a page has more elements than room", store.ErrCorrupt)
	}
	return at, page[at : at+elementSize], nil
}

// cut returns n bytes of a page, at pos+skip after the element that begins at at.
func cut(page []byte, at int, pos, skip, n uint32) ([]byte, error) {
	from := uint64(at) + uint64(pos) + uint64(skip)
	if from+uint64(n) > uint64(len(page)) {
		return nil, fmt.Errorf("%w: an element reaches beyond its page", store.ErrCorrupt)
	}
	return page[from : from+uint64(n)], nil
}

// checkFreelist makes sure that no page in use counts as free. This store writes no list, but a bbolt tool may have.
func (p *pages) checkFreelist() error {
	if p.freelist == noFreelist {
		return nil
	}
	page, err := p.page(p.freelist)
	if err != nil {
		return err
	}
	count, at := uint64(native.Uint16(page[10:])), uint64(pageHeader)
	if native.Uint16(page[8:]) != flagFreelist {
		return fmt.Errorf("%w: page %d is not the list of free pages", store.ErrCorrupt, p.freelist)
	}
	if count == 0xFFFF {
		count, at = native.Uint64(page[at:]), at+8
	}
	if count > (uint64(len(page))-at)/8 {
		return fmt.Errorf("%w: its list of free pages is longer than its page", store.ErrCorrupt)
	}
	for ; count > 0; count, at = count-1, at+8 {
		id := native.Uint64(page[at:])
		if id < 2 || id >= p.end || p.seen[id] {
			return fmt.Errorf("%w: page %d is in use or does not exist, and counts as free", store.ErrCorrupt, id)
		}
		p.seen[id] = true
	}
	return nil
}
