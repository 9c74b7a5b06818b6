package k8s

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/signet-id/signet/agent/workloadattest/container"
)

const (
	// maxListBytes bounds the kubelet's answer as a whole, and maxPodBytes one pod in it. Who may make a pod must not be able to
	// hide those of others by it: etcd holds objects of up to 1.5 MiB, of which each byte may be six in JSON.
	maxListBytes = 128 << 20
	maxPodBytes  = 10 << 20
	maxPods      = 4096
	maxKeys      = 32 // of the list itself, which has four
	// maxContainers, maxLabels and maxOwners bound what becomes selectors of one process.
	maxContainers = 512
	maxLabels     = 1024
	maxOwners     = 64
)

// A pod is what is kept of one.
type pod struct {
	namespace, name, uid     string
	nodeName, serviceAccount string
	labels                   map[string]string
	owners                   []owner
	containers, inits        []member
	ephemeral                []member
	ended, deleted           bool
	excess                   bool // it has more labels, owners or containers than are looked at, and so has no selectors
}

type owner struct{ kind, name, uid string }

// A member is a container of a pod.
type member struct {
	name, image, imageID string
	id                   string // 64 hex digits, or empty
	running              bool
	ended                bool // for good; one that neither runs nor has ended is about to run
}

// members are all containers of the pod.
func (p *pod) members(yield func(*member) bool) {
	for _, some := range [][]member{p.containers, p.inits, p.ephemeral} {
		for i := range some {
			if !yield(&some[i]) {
				return
			}
		}
	}
}

// A podList is what the kubelet said at one moment. It is not changed once it is complete.
type podList struct {
	// started is when it was asked for: what was so before shows in it, as far as the kubelet knew.
	started time.Time
	byUID   map[string]*pod
	byID    map[string]place
	twice   map[string]bool   // containers that several pods have, as it seems
	byName  map[string][]*pod // by NAMESPACE/NAME
}

type place struct {
	pod    *pod
	member *member
}

func newPodList(started time.Time) *podList {
	return &podList{started: started, byUID: map[string]*pod{}, byID: map[string]place{}, twice: map[string]bool{}, byName: map[string][]*pod{}}
}

// add takes a pod. A list in which a uid is there twice is none of a kubelet. But what containers a pod has is in its status,
// which somebody in the cluster may have the right to write.
func (l *podList) add(p *pod) error {
	if len(l.byUID) == maxPods {
		return fmt.Errorf("there are more than %d pods", maxPods)
	}
	if l.byUID[p.uid] != nil {
		return fmt.Errorf("pod %.100q is there twice", p.uid)
	}
	l.byUID[p.uid] = p
	name := p.namespace + "/" + p.name
	l.byName[name] = append(l.byName[name], p)
	for m := range p.members {
		if m.id == "" {
			continue
		}
		if _, known := l.byID[m.id]; known {
			l.twice[m.id] = true
			continue
		}
		l.byID[m.id] = place{p, m}
	}
	return nil
}

// find looks a container up. It returns nil and no error if the kubelet does not know it yet.
//
// The pod that the container's cgroup is in must be the one that the kubelet says: else a kubelet that mixes things up would
// give one pod the identity of another.
func (l *podList) find(c container.Container) (*pod, *member, error) {
	p, m, err := l.look(c)
	if p != nil && p.excess {
		return nil, nil, fmt.Errorf("%s: pod %.100q in namespace %.100q: %w", describe(c), p.name, p.namespace, errExcess)
	}
	return p, m, err
}

var errExcess = fmt.Errorf("it has too many labels (at most %d), owners (%d) or containers (%d), so that it has no selectors", maxLabels, maxOwners, maxContainers)

func (l *podList) look(c container.Container) (*pod, *member, error) {
	p := l.byUID[c.PodUID]
	switch {
	case c.ID != "":
		at, known := l.place(c.ID, p)
		switch {
		case known && c.PodUID == "" && l.twice[c.ID]:
			return nil, nil, fmt.Errorf("%s: %w: the kubelet says that several pods have the container", describe(c), ErrMismatch)
		case known && c.PodUID != "" && at.pod != p:
			return nil, nil, fmt.Errorf("%s: %w: the kubelet says that the container is of pod %s", describe(c), ErrMismatch, at.pod.uid)
		case !known && p != nil && p.excess:
			return p, nil, nil
		case !known && p != nil && p.ended:
			return nil, nil, fmt.Errorf("%s: %w: the pod has ended", describe(c), ErrNotFound)
		case !known:
			return nil, nil, nil
		}
		switch {
		case at.member.ended || at.pod.ended:
			return nil, nil, fmt.Errorf("%s: %w: the kubelet says that the container does not run", describe(c), ErrNotFound)
		case !at.member.running:
			return nil, nil, nil
		}
		return at.pod, at.member, nil
	case p == nil:
		return nil, nil, nil
	case p.ended:
		return nil, nil, fmt.Errorf("%s: %w: the pod has ended", describe(c), ErrNotFound)
	case c.Name == "":
		return p, nil, nil
	}
	for m := range p.members {
		if m.name == c.Name && m.running {
			return p, m, nil
		}
	}
	return nil, nil, nil
}

// starting returns the pod of a container that find does not know yet, if the kubelet may be about to tell of one: it has told of
// none of the pod's, or one of them neither runs nor has ended.
func (l *podList) starting(c container.Container) *pod {
	p := l.byUID[c.PodUID]
	if p == nil || p.ended || p.deleted || p.excess {
		return nil
	}
	told := false
	for m := range p.members {
		if told = true; !m.running && !m.ended {
			return p
		}
	}
	if told {
		return nil
	}
	return p
}

// place is where a container is: in p, if p says so.
func (l *podList) place(id string, p *pod) (place, bool) {
	if p != nil {
		for m := range p.members {
			if m.id == id {
				return place{p, m}, true
			}
		}
	}
	at, known := l.byID[id]
	return at, known
}

// podJSON is what is read of a pod.
type podJSON struct {
	Metadata struct {
		Namespace         string            `json:"namespace"`
		Name              string            `json:"name"`
		UID               string            `json:"uid"`
		DeletionTimestamp string            `json:"deletionTimestamp"`
		Labels            map[string]string `json:"labels"`
		OwnerReferences   []struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
			UID  string `json:"uid"`
		} `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
	} `json:"spec"`
	Status struct {
		Phase      string       `json:"phase"`
		Containers []statusJSON `json:"containerStatuses"`
		Inits      []statusJSON `json:"initContainerStatuses"`
		Ephemeral  []statusJSON `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

type statusJSON struct {
	Name        string `json:"name"`
	Image       string `json:"image"`
	ImageID     string `json:"imageID"`
	ContainerID string `json:"containerID"`
	State       struct {
		Running    *struct{} `json:"running"`
		Terminated *struct{} `json:"terminated"`
	} `json:"state"`
	LastState struct {
		Terminated struct {
			ContainerID string `json:"containerID"`
		} `json:"terminated"`
	} `json:"lastState"`
}

// decodePods reads a PodList, pod by pod, so that no more than one is held as text.
func decodePods(r io.Reader, each func(*pod) error) error {
	limited := &limitedReader{r: r, total: maxListBytes, left: maxPodBytes}
	d := json.NewDecoder(limited)
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	kind, items := "", false
	for keys := 1; d.More(); keys++ {
		if keys > maxKeys {
			return fmt.Errorf("it is not a PodList: it has more than %d parts", maxKeys)
		}
		key, err := d.Token()
		if err != nil {
			return notAList(err)
		}
		limited.left = maxPodBytes
		switch key {
		case "kind":
			if err := d.Decode(&kind); err != nil {
				return notAList(err)
			}
		case "items":
			if items {
				return errors.New("it has items twice")
			}
			items = true
			if err := decodeItems(d, limited, each); err != nil {
				return err
			}
		default:
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return notAList(err)
			}
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return err
	}
	if kind != "PodList" || !items {
		return fmt.Errorf("it is of kind %.100q, and not a PodList", kind)
	}
	return nil
}

func decodeItems(d *json.Decoder, limited *limitedReader, each func(*pod) error) error {
	start, err := d.Token()
	if err != nil {
		return notAList(err)
	}
	if start == nil {
		return nil // null: there are none
	}
	if start != json.Delim('[') {
		return errors.New("its items are not a list")
	}
	for d.More() {
		var text podJSON
		limited.left = maxPodBytes
		if err := d.Decode(&text); err != nil {
			return notAList(err)
		}
		p, err := text.pod()
		if err != nil {
			return err
		}
		if err := each(p); err != nil {
			return err
		}
	}
	return expect(d, json.Delim(']'))
}

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err != nil {
		return notAList(err)
	}
	if got != want {
		return fmt.Errorf("it is not a PodList: there is %.100q where %q should be", fmt.Sprint(got), want.String())
	}
	return nil
}

func notAList(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it ends before the PodList does")
	}
	return fmt.Errorf("it is not a PodList: %w", err)
}

// A limitedReader reads at most total, and at most left until somebody sets that anew. It fills what it is given, since a
// decoder goes over blanks again after each read, and somebody could send them one by one.
type limitedReader struct {
	r           io.Reader
	total, left int
	err         error // that is told next
}

func (l *limitedReader) Read(p []byte) (int, error) {
	switch {
	case l.err != nil:
		return 0, l.err
	case l.left <= 0:
		return 0, fmt.Errorf("one object in it is larger than %d bytes", maxPodBytes)
	case l.total <= 0:
		return 0, fmt.Errorf("it is larger than %d bytes", maxListBytes)
	}
	n, err := io.ReadFull(l.r, p[:min(len(p), l.left, l.total)])
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	l.left -= n
	l.total -= n
	if l.err = err; n == 0 {
		return 0, err
	}
	return n, nil
}

// pod checks a pod and keeps what is needed of it.
func (j *podJSON) pod() (*pod, error) {
	m, s := &j.Metadata, &j.Status
	if m.UID == "" || m.Name == "" || m.Namespace == "" {
		return nil, fmt.Errorf("pod %.100q in namespace %.100q has no name, no namespace or no uid", m.Name, m.Namespace)
	}
	excess := len(m.Labels) > maxLabels || len(m.OwnerReferences) > maxOwners || len(s.Containers)+len(s.Inits)+len(s.Ephemeral) > maxContainers
	if excess {
		m.Labels, m.OwnerReferences, s.Containers, s.Inits, s.Ephemeral = nil, nil, nil, nil, nil
	}
	p := &pod{
		namespace: m.Namespace, name: m.Name, uid: m.UID, nodeName: j.Spec.NodeName, serviceAccount: j.Spec.ServiceAccountName, labels: m.Labels,
		containers: members(s.Containers), inits: members(s.Inits), ephemeral: members(s.Ephemeral),
		ended: s.Phase == "Succeeded" || s.Phase == "Failed", deleted: m.DeletionTimestamp != "", excess: excess,
	}
	for _, o := range m.OwnerReferences {
		p.owners = append(p.owners, owner{o.Kind, o.Name, o.UID})
	}
	return p, nil
}

var hexID = regexp.MustCompile(`^[0-9a-f]{64}$`)

func members(statuses []statusJSON) []member {
	var all []member
	for _, s := range statuses {
		// RUNTIME://ID
		_, id, _ := strings.Cut(s.ContainerID, "://")
		if !hexID.MatchString(id) {
			id = ""
		}
		all = append(all, member{
			name: s.Name, image: s.Image, imageID: s.ImageID, id: id, running: s.State.Running != nil,
			// Until a container is made anew, its status has the id of the one before, which is also that of the last state.
			ended: s.State.Terminated != nil || s.State.Running == nil && s.ContainerID != "" && s.LastState.Terminated.ContainerID == s.ContainerID,
		})
	}
	return all
}
