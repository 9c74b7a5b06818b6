package docker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/signet-id/signet/workloadapi/peer"
)

const (
	maxMapBytes = 32 << 10 // the kernel takes 340 lines
	allIDs      = 1<<32 - 1
)

// inNamespaceOf returns nil if the process is in a user namespace that has the user in it. Only that user, and root, can make
// one: without root's help a user maps himself alone, and with it (newuidmap) what root has given him.
//
// This is asked of the map and not of the namespace itself, which only those who may trace the process get to see.
func inNamespaceOf(p *peer.Process, uid uint32) error {
	theirs, err := readMap("/proc/" + strconv.Itoa(int(p.PID)) + "/uid_map")
	if gone := p.Alive(); gone != nil {
		return gone
	}
	if err != nil {
		return err
	}
	ours, err := readMap("/proc/self/uid_map")
	if err != nil {
		return err
	}
	if bytes.Equal(theirs, ours) {
		return errors.New("the process is in the agent's user namespace, and in none of its user's")
	}
	extents, err := parseMap(theirs)
	if err != nil {
		return err
	}
	for _, e := range extents {
		if e.size == allIDs {
			break // all there are: nobody's own
		}
		if uint64(uid) >= e.first && uint64(uid)-e.first < e.size {
			return nil
		}
	}
	return fmt.Errorf("the process is in a user namespace that does not have uid %d in it", uid)
}

func readMap(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxMapBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > maxMapBytes {
		return nil, fmt.Errorf("%s is longer than %d bytes", name, maxMapBytes)
	}
	return data, nil
}

// An extent is a range of users, in the terms of the agent's namespace.
type extent struct{ first, size uint64 }

// parseMap reads a map of a user namespace: lines of the first id inside, the first outside, and how many.
func parseMap(data []byte) ([]extent, error) {
	var all []extent
	for line := range bytes.Lines(data) {
		f := bytes.Fields(line)
		if len(f) != 3 {
			return nil, fmt.Errorf("uid_map has the line %.80q", line)
		}
		var n [3]uint64
		for i := range f {
			var err error
			if n[i], err = strconv.ParseUint(string(f[i]), 10, 32); err != nil {
				return nil, fmt.Errorf("uid_map has the line %.80q", line)
			}
		}
		all = append(all, extent{n[1], n[2]})
	}
	return all, nil
}
