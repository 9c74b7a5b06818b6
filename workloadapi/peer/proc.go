package peer

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

const (
	// maxStatBytes bounds /proc/PID/stat: about 50 numbers and a name of at most 64 bytes.
	maxStatBytes = 4 << 10

	// maxStatusBytes bounds /proc/PID/status, where a process may list 65536 groups of up to 11 bytes each.
	maxStatusBytes = 1 << 20
)

// parseStartTime returns field 22 of /proc/PID/stat, in clock ticks after boot.
//
// The second field is the program's name in parentheses; it is chosen by the program and may hold spaces and
// parentheses itself. So fields are counted from the last closing one.
func parseStartTime(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("stat holds no name in parentheses")
	}
	const field = 22 - 3 // the first field after the name is number 3
	fields := bytes.Fields(stat[end+1:])
	if len(fields) <= field {
		return 0, fmt.Errorf("stat has %d fields after the name, want more than %d", len(fields), field)
	}
	ticks, err := strconv.ParseUint(string(fields[field]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("start time %q in stat is not a number", fields[field])
	}
	return ticks, nil
}

// parseStatus fills in users and groups from /proc/PID/status. The kernel escapes line feeds in the program's name, so
// that a program cannot add lines; a line that comes twice is refused all the same.
func parseStatus(status []byte, s *Snapshot) error {
	var uids, gids, groups bool
	for line := range bytes.Lines(status) {
		name, value, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(":"))
		if !ok {
			continue
		}
		var seen *bool
		switch string(name) {
		case "Uid":
			seen = &uids
		case "Gid":
			seen = &gids
		case "Groups":
			seen = &groups
		default:
			continue
		}
		if *seen {
			return fmt.Errorf("status has two lines %q", name)
		}
		*seen = true
		ids, err := parseIDs(value)
		if err != nil {
			return fmt.Errorf("%s in status: %w", name, err)
		}
		switch {
		case seen == &groups:
			slices.Sort(ids)
			s.Groups = slices.Compact(ids)
		case len(ids) != 4:
			return fmt.Errorf("%s in status has %d ids, want 4", name, len(ids))
		case seen == &uids:
			s.RealUID, s.EffectiveUID, s.SavedUID = ids[0], ids[1], ids[2]
		default:
			s.RealGID, s.EffectiveGID, s.SavedGID = ids[0], ids[1], ids[2]
		}
	}
	if !uids || !gids || !groups {
		return errors.New("status lacks a line Uid, Gid or Groups")
	}
	return nil
}

func parseIDs(value []byte) ([]uint32, error) {
	var ids []uint32
	for field := range bytes.FieldsSeq(value) {
		id, err := strconv.ParseUint(string(field), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%q is not an id", field)
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}
