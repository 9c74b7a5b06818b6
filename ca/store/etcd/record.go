package etcd

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/signet-id/signet/ca/store"
)

// What lies below the prefix. Nothing else does.
const (
	itemSpace  = "k/"    // an item's key follows
	markKey    = "mark"  // written by each commit, as the last of its writes
	epochKey   = "epoch" // the name of the history
	compactKey = "compact"
)

// A value in etcd is a format version, a checksum of key and value, and the value: what somebody else wrote, or was damaged or
// moved, is not taken for ours.
const (
	recordVersion = 1
	recordHead    = 1 + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(key string, value []byte) uint32 {
	sum := crc32.Checksum(binary.BigEndian.AppendUint32(nil, uint32(len(key))), castagnoli)
	sum = crc32.Update(sum, castagnoli, []byte(key))
	return crc32.Update(sum, castagnoli, value)
}

// seal makes the value that etcd keeps under key, which is without the prefix.
func seal(key string, value []byte) string {
	b := make([]byte, 0, recordHead+len(value))
	b = append(b, recordVersion)
	b = binary.BigEndian.AppendUint32(b, checksum(key, value))
	return string(append(b, value...))
}

// unseal returns what seal was given, in memory of its own.
func unseal(key string, record []byte) ([]byte, error) {
	if len(record) > 0 && record[0] != recordVersion {
		return nil, fmt.Errorf("%w: key %q has a value of format %d, this signet reads %d (did somebody else write it, or a newer signet?)", store.ErrCorrupt, key, record[0], recordVersion)
	}
	if len(record) < recordHead {
		return nil, fmt.Errorf("%w: key %q has a value of %d bytes, which signet did not write", store.ErrCorrupt, key, len(record))
	}
	value := record[recordHead:]
	if binary.BigEndian.Uint32(record[1:recordHead]) != checksum(key, value) {
		return nil, fmt.Errorf("%w: the value of key %q does not have its checksum (did somebody else write below the prefix?)", store.ErrCorrupt, key)
	}
	return append([]byte{}, value...), nil
}
