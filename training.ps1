# Trains overnight on Windows, then writes the results into README.md.
#
#   powershell -ExecutionPolicy Bypass -File training.ps1
#   powershell -ExecutionPolicy Bypass -File training.ps1 --steps 20000 --out_dir out/long
#
# Works in Windows PowerShell 5.1 and PowerShell 7, from any directory; paths are relative to this
# file's folder. Arguments are passed on to train.py and override the ones below. Write them as
# --flag value: PowerShell splits --flag=value where the value has a colon, as in C:\runs or cuda:1.
# After a power cut, run the same command again: the run continues from its last checkpoint. The exit
# code is train.py's, or, after a run that went well, update_readme.py's.

$ErrorActionPreference = 'Stop'
$PSNativeCommandUseErrorActionPreference = $false   # PowerShell 7: exit codes are handled below

$trainArgs = @(
    '--preset', 'gpt2',
    '--input_file', 'data/input.txt',
    '--out_dir', 'out/gpt2',
    '--target_loss', '0.099999'
)
$trainArgs += $args

# The last --out_dir wins, in train.py as here.
$outDir = ''
for ($i = 0; $i -lt $trainArgs.Count; $i++) {
    if ($trainArgs[$i] -match '^--out[_-]dir=(.+)$') { $outDir = $Matches[1] }
    elseif ($trainArgs[$i] -match '^--out[_-]dir$' -and $i + 1 -lt $trainArgs.Count) { $outDir = $trainArgs[$i + 1] }
}

# Windows goes to sleep under a busy program unless the program asks it not to (PowerShell 5.1 has no $IsWindows).
$power = $null
$onWindows = $env:OS -eq 'Windows_NT'
if ($onWindows) {
    $keepAwake = [uint32]2147483649   # ES_CONTINUOUS | ES_SYSTEM_REQUIRED
    $asBefore = [uint32]2147483648    # ES_CONTINUOUS
    try {
        $power = Add-Type -Name Power -Namespace Training -PassThru -MemberDefinition `
            '[DllImport("kernel32.dll")] public static extern uint SetThreadExecutionState(uint flags);'
    }
    catch { Write-Warning "This machine may go to sleep during the run: $_" }
}

$exitCode = 1
Push-Location -LiteralPath $PSScriptRoot
try {
    $python = 'python'
    foreach ($candidate in '.venv/Scripts/python.exe', '.venv/bin/python') {
        if (Test-Path -LiteralPath $candidate) { $python = Join-Path $PSScriptRoot $candidate }
    }
    if ($power) { [void]$power::SetThreadExecutionState($keepAwake) }

    $ErrorActionPreference = 'Continue'   # the editor of 5.1 takes what a program writes to stderr for an error
    & $python train.py @trainArgs
    $exitCode = $LASTEXITCODE
    if ($exitCode -eq 0 -and (Test-Path -LiteralPath (Join-Path $outDir 'results.json'))) {
        & $python update_readme.py --out_dir $outDir --readme README.md
        $exitCode = $LASTEXITCODE
    }
}
finally {
    if ($power) { [void]$power::SetThreadExecutionState($asBefore) }
    Pop-Location
}
exit $exitCode
