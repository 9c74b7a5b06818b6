package bolt

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/signet-id/signet/ca/store"
)

// The file holds two buckets. "meta" has the format version, the epoch and the state; "items" has a record for each key:
//
//	1 byte   record version, 1
//	4 bytes  CRC-32C, little endian, of the key and all that follows
//	varint   revision that created the key
//	varint   revision that last wrote it
//	rest     the value
//
// bbolt protects its two meta pages by checksums and nothing else. The record's checksum covers what bbolt does not; the
// state's count and digest cover what a lost or stale page would hide.
const recordVersion = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendRecord returns the record of an item and its checksum.
func appendRecord(dst []byte, it store.Item) (record []byte, sum uint32) {
	start := len(dst)
	dst = append(dst, recordVersion, 0, 0, 0, 0)
	dst = binary.AppendUvarint(dst, uint64(it.Created))
	dst = binary.AppendUvarint(dst, uint64(it.Modified))
	dst = append(dst, it.Value...)
	sum = checksum(it.Key, dst[start+5:])
	binary.LittleEndian.PutUint32(dst[start+1:], sum)
	return dst, sum
}

func checksum(key string, rest []byte) uint32 {
	var length [8]byte
	binary.LittleEndian.PutUint64(length[:], uint64(len(key)))
	sum := crc32.Update(0, castagnoli, length[:])
	sum = crc32.Update(sum, castagnoli, []byte(key))
	return crc32.Update(sum, castagnoli, rest)
}

// parseRecord returns the item of a record. Its value points into the record. A record that is not exactly what
// appendRecord made for this key is store.ErrCorrupt.
func parseRecord(key string, record []byte) (it store.Item, sum uint32, err error) {
	if len(record) < 7 || record[0] != recordVersion {
		return store.Item{}, 0, fmt.Errorf("%w: the record of key %q is not one", store.ErrCorrupt, key)
	}
	sum = binary.LittleEndian.Uint32(record[1:])
	rest := record[5:]
	if checksum(key, rest) != sum {
		return store.Item{}, 0, fmt.Errorf("%w: the record of key %q does not match its checksum", store.ErrCorrupt, key)
	}
	created, n := binary.Uvarint(rest)
	modified, m := uint64(0), 0
	if n > 0 {
		modified, m = binary.Uvarint(rest[n:])
	}
	if n <= 0 || m <= 0 || created == 0 || created > modified || modified > 1<<62 {
		return store.Item{}, 0, fmt.Errorf("%w: the record of key %q has no sensible revisions", store.ErrCorrupt, key)
	}
	return store.Item{Key: key, Value: rest[n+m:], Created: store.Revision(created), Modified: store.Revision(modified)}, sum, nil
}

// state is what every commit changes besides items.
type state struct {
	revision store.Revision
	count    uint64 // items
	digest   uint64 // sum of mix(checksum) over all items
}

const stateBytes = 3*8 + 4

func (s *state) add(sum uint32)    { s.count++; s.digest += mix(sum) }
func (s *state) remove(sum uint32) { s.count--; s.digest -= mix(sum) }

// mix spreads a checksum over 64 bits, so that sums of them do not cancel out. (The finalizer of splitmix64.)
func mix(sum uint32) uint64 {
	z := uint64(sum) + 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

func (s state) bytes() []byte {
	b := make([]byte, 0, stateBytes)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.revision))
	b = binary.LittleEndian.AppendUint64(b, s.count)
	b = binary.LittleEndian.AppendUint64(b, s.digest)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func parseState(b []byte) (state, error) {
	if len(b) != stateBytes || crc32.Checksum(b[:stateBytes-4], castagnoli) != binary.LittleEndian.Uint32(b[stateBytes-4:]) {
		return state{}, fmt.Errorf("%w: its revision counter does not match its checksum", store.ErrCorrupt)
	}
	s := state{
		revision: store.Revision(binary.LittleEndian.Uint64(b)),
		count:    binary.LittleEndian.Uint64(b[8:]),
		digest:   binary.LittleEndian.Uint64(b[16:]),
	}
	if s.revision < 1 {
		return state{}, fmt.Errorf("%w: its revision is %d", store.ErrCorrupt, s.revision)
	}
	return s, nil
}
