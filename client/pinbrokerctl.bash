# SPDX-License-Identifier: LGPL-2.1-or-later
# bash completion for pinbrokerctl

# The ids of objects of a kind, as far as the user may see them; nothing where there is no broker.
__pinbrokerctl_ids() {
	local options=() i
	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		--socket) options+=(--socket "${COMP_WORDS[i + 1]}") ;;
		esac
	done
	timeout 2 "${COMP_WORDS[0]}" list "$1" "${options[@]}" --no-legend --no-pager 2>/dev/null |
		while read -r id _; do echo "$id"; done
}

_pinbrokerctl() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb= i
	local common='--bus --socket --json --no-legend --no-pager --help --version'
	local -A options=(
		[status]= [list]='--file --client' [show]= [watch]= [map]= [preflight]=
		[revoke]='--file --client --mount --device --reason --timeout --wait --no-wait'
		[hold]='--access --range --on-revoke'
	)
	COMPREPLY=()

	# --option=value comes as three words.
	[[ $cur == = ]] && cur=
	[[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD - 2]}
	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		--bus | --socket | --json)
			[[ ${COMP_WORDS[i + 1]} == = ]] && ((i++))
			((i++))
			;;
		-- | -*) ;;
		*)
			verb=${COMP_WORDS[i]}
			break
			;;
		esac
	done

	case $verb:$prev in
	*:--json) COMPREPLY=($(compgen -W 'short pretty' -- "$cur")) ;;
	*:--access) COMPREPLY=($(compgen -W 'read write' -- "$cur")) ;;
	*:--on-revoke) COMPREPLY=($(compgen -W 'release ignore' -- "$cur")) ;;
	*:--bus | *:--reason | *:--timeout | *:--range | *:--device) ;;
	*:--socket | revoke:--file) COMPREPLY=($(compgen -f -- "$cur")) ;;
	*:--mount) COMPREPLY=($(compgen -d -- "$cur")) ;;
	list:--file) COMPREPLY=($(compgen -W "$(__pinbrokerctl_ids files)" -- "$cur")) ;;
	*:--client) COMPREPLY=($(compgen -W "$(__pinbrokerctl_ids clients)" -- "$cur")) ;;
	*)
		if [[ $cur == -* ]]; then
			COMPREPLY=($(compgen -W "$common ${options[${verb:-status}]}" -- "$cur"))
			return
		fi
		case $verb in
		'') COMPREPLY=($(compgen -W "${!options[*]}" -- "$cur")) ;;
		list) COMPREPLY=($(compgen -W 'pins files clients contexts revocations' -- "$cur")) ;;
		revoke) COMPREPLY=($(compgen -W "$(__pinbrokerctl_ids pins)" -- "$cur")) ;;
		show)
			COMPREPLY=($(compgen -W "$(for kind in pins files clients contexts revocations; do
				__pinbrokerctl_ids "$kind"
			done)" -- "$cur"))
			;;
		map | preflight | hold) COMPREPLY=($(compgen -f -- "$cur")) ;;
		esac
		;;
	esac
}

complete -o filenames -F _pinbrokerctl pinbrokerctl
