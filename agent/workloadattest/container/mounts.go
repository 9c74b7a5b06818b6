package container

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

var (
	// What a kubelet and the engines put over files of a container, by where those files are.
	podHosts = pattern(`/pods/` + uid + `/etc-hosts$`)
	podLog   = pattern(`/pods/` + uid + `/containers/([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)/[0-9a-f]{8}$`)
	ofDocker = pattern(`/containers/([0-9a-f]{64})/(hostname|hosts|resolv\.conf)$`)
	ofPodman = pattern(`/[a-z]+-containers/([0-9a-f]{64})/userdata/(hostname|hosts|resolv\.conf)$`)
)

// ownContainer says what container the agent is in, from its own mountinfo, which is as the engine made it. In a pod the
// files of an engine are those of the pod's sandbox, so that the pod's uid and the container's name are what is known.
func ownContainer(mountinfo []byte) (Container, error) {
	var pod, other Container
	for text := range bytes.Lines(mountinfo) {
		root, point, err := readMount(strings.TrimSuffix(string(text), "\n"))
		if err != nil {
			return Container{}, err
		}
		if m := podLog().FindStringSubmatch(root); m != nil {
			if err := pod.merge(Container{PodUID: dashes(m[1]), Path: root}); err != nil {
				return Container{}, err
			}
			pod.Name = m[3]
		}
		switch point {
		case "/etc/hosts", "/etc/hostname", "/etc/resolv.conf":
		default:
			continue
		}
		if m := podHosts().FindStringSubmatch(root); m != nil {
			if err := pod.merge(Container{PodUID: dashes(m[1]), Path: root}); err != nil {
				return Container{}, err
			}
		}
		engine := Container{}
		if m := ofPodman().FindStringSubmatch(root); m != nil {
			engine = Container{ID: m[1], Runtime: "podman", Path: root}
		} else if m := ofDocker().FindStringSubmatch(root); m != nil {
			engine = Container{ID: m[1], Runtime: "docker", Path: root}
		}
		if engine.ID != "" && pod.PodUID == "" {
			if err := other.merge(engine); err != nil {
				return Container{}, err
			}
		}
	}
	pod.Path, other.Path = "", ""
	if pod.PodUID != "" {
		return pod, nil
	}
	return other, nil
}

// readMount reads a line of mountinfo: what of the filesystem is mounted, and where.
func readMount(text string) (root, point string, err error) {
	fields := strings.SplitN(text, " ", 6)
	if len(fields) < 6 {
		return "", "", fmt.Errorf("line %.200q has too few fields: %w", text, ErrMalformed)
	}
	return unescape(fields[3]), unescape(fields[4]), nil
}

// unescape turns \040 and its like into what they stand for: a space, tab, newline or backslash.
func unescape(text string) string {
	if !strings.Contains(text, `\`) {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+3 < len(text) {
			if n, err := strconv.ParseUint(text[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(text[i])
	}
	return b.String()
}
